"""On whose account a call runs, and the salt that keeps tenants' cached blocks apart.

Owns both decisions for the gateway: nothing in a request's body or metadata has a say. Does not
know quotas, nor how callers prove who they are: today nobody does, and all are the default tenant.

The salt is the first 16 bytes of HMAC-SHA256(cluster secret, tenant's name) (contracts, section 4).
Without the secret nobody can make prompts whose blocks collide with another tenant's on purpose.
"""

import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc

from rillgate_server.core.request import DEFAULT_TENANT, NO_SALT, Tenant

# Any: grpc's context is generic in message types that one servicer has many of.
TenantOf = Callable[[grpc.aio.ServicerContext[Any, Any]], Tenant]


@dataclass(frozen=True, slots=True)
class Account:
    """What a call's tenant means for its request."""

    tenant: Tenant
    cache_salt: bytes
    """16 bytes."""


def default_tenant(context: grpc.aio.ServicerContext[Any, Any]) -> Tenant:
    """Return the tenant of everybody."""
    return DEFAULT_TENANT


def cache_salt(cluster_secret: str, tenant_name: str) -> bytes:
    """Return a tenant's salt: the same at every gateway with this secret."""
    digest = hmac.digest(cluster_secret.encode(), tenant_name.encode(), "sha256")
    return digest[: len(NO_SALT)]


class Tenancy:
    """Finds a call's account. Holds the cluster's secret, and shows it to nobody."""

    def __init__(self, cluster_secret: str, tenant_of: TenantOf = default_tenant) -> None:
        """Take the secret, and who says which tenant a connection belongs to."""
        self._cluster_secret = cluster_secret
        self._tenant_of = tenant_of

    def __repr__(self) -> str:
        return f"Tenancy({self._tenant_of.__name__})"

    def account(self, context: grpc.aio.ServicerContext[Any, Any]) -> Account:
        """Return the account of the call with this context."""
        tenant = self._tenant_of(context)
        return Account(tenant, cache_salt(self._cluster_secret, tenant.name))
