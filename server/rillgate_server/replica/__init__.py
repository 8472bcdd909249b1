"""The replica process: an engine behind a gRPC door."""
