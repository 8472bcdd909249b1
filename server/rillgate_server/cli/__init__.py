"""The server's commands; wires everything."""
