"""Private swarms: who belongs to one, how that is shown, and how somebody comes to belong.

A private swarm is an Ed25519 key. Whoever has its private half (`authority`) hands out invitations
(`invitation`); whoever redeems one is a *member*: a key of their own, certified by the swarm's key
(`certificate`), kept in their data folder (`wallet`). Each process of a member has a peer id of its
own, for which the member signs, and shows both signatures wherever it asks for something.
"""

# For so long an invitation can be redeemed, if nothing else is said: a week.
INVITATION_SECONDS = 7 * 86400
# A membership lasts for a year and is renewed in its last quarter, whenever its member connects.
RENEW_SECONDS = 91 * 86400
