"""Messages between machines: a server that drives a coordinator, a client that dials out. No round logic lives here."""
