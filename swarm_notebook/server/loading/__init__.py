"""The blocks of a server before they serve: how many fit, at how many bits, and their reading."""
