"""What one domain may use of the store. Domain 0 has no limits."""

from dataclasses import dataclass, fields, replace

from nonroot.xenstore.errors import StoreError

__all__ = ["Quota"]


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits for each unprivileged domain. Defaults are xenstored's where it has the same one."""

    nodes: int = 1000
    """Nodes that it owns."""
    bytes: int = 1 << 20
    """Names and values of the nodes that it owns, together."""
    node_size: int = 2048
    """Bytes of one value."""
    permissions: int = 5
    """Entries of one node's permission list."""
    watches: int = 128
    transactions: int = 10
    """Open at the same time."""
    transaction_nodes: int = 1024
    """Things read and changed in one transaction."""
    path: int = 3072
    """Bytes of an absolute path that it uses."""

    @classmethod
    def names(cls) -> list[str]:
        """The limits by name."""
        return [field.name for field in fields(cls)]

    def changed(self, name: str, value: int) -> "Quota":
        """Another limit for ``name``. StoreError EINVAL if there is no such limit, or the value is none."""
        if name not in self.names() or not 0 <= value < 1 << 31:
            raise StoreError("EINVAL")
        return replace(self, **{name: value})
