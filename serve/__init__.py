"""The HTTP service on Ray Serve (wire types, client, deployment)."""
