"""Rillgate's server: gateway, replica and supervisor."""
