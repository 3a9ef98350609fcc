"""A cached decode over a chain of servers, which survives the loss of any of them."""
