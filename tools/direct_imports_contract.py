"""A contract for import-linter: which packages from outside a package of ours may import itself.

Owns that one rule. Knows nothing of the floors inside the server (import-linter's own layers say
those). Unlike its `forbidden` contract this one lists what is allowed, so a new dependency is a
decision; the standard library always is. Packages that do not exist yet are passed over.
"""

import sys
from collections.abc import Iterable
from typing import cast

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


class DirectImportsContract(Contract):
    """`packages` import directly nothing from outside but `allowed` and the standard library.

    A package is a root package or a part of one; what lies inside the same root package is none of
    this contract's business. `except_packages` below `packages` are passed over.
    """

    type_name = "direct_imports"

    packages = fields.SetField(subfield=fields.StringField())
    except_packages = fields.SetField(subfield=fields.StringField(), required=False)
    allowed = fields.SetField(subfield=fields.StringField(), required=False)

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Collect `importer -> imported` for every import that is not allowed."""
        del verbose
        allowed = sys.stdlib_module_names | _names(self.allowed)
        offences = sorted(
            (importer, imported)
            for importer in graph.modules
            if self._covers(importer)
            for imported in graph.find_modules_directly_imported_by(importer)
            if imported.split(".")[0] not in {*allowed, importer.split(".")[0]}
        )
        return ContractCheck(kept=not offences, metadata={"offences": offences})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print one line per offence."""
        for importer, imported in check.metadata["offences"]:
            output.print_error(f"{importer} must not import {imported}")

    def _covers(self, module: str) -> bool:
        return _is_within(module, _names(self.packages)) and not _is_within(
            module, _names(self.except_packages)
        )


def _names(field: object) -> set[str]:
    """Read a declared field, which import-linter replaces with the configured strings, or None."""
    return set(cast(Iterable[str], field or ()))


def _is_within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
