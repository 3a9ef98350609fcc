"""What a server hears and says: the RPCs, their messages, and the checks of what strangers send."""
