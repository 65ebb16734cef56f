"""XenStore: the store, its wire protocol, its process, and a client."""

from nonroot.xenstore.errors import StoreError, XenStoreError, XenStoreLostError

__all__ = ["StoreError", "XenStoreError", "XenStoreLostError"]
