"""Adapters of notebooks on a server: what may be uploaded, how it is kept, put in and mixed."""
