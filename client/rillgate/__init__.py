"""Rillgate's client: needs grpcio and protobuf alone, and never imports the server."""
