"""The protocol: .proto files and, beside them, the Python code generated from them."""
