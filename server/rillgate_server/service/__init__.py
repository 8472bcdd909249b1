"""gRPC plumbing that the programs share."""
