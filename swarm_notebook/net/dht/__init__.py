"""What stands in the DHT: the records of servers, and which of them a peer keeps for others."""
