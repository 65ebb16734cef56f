"""hvm_op: the domain's parameters, and the vectors of its upcalls."""

import struct
from collections.abc import Callable

from nonroot.xen.abi import (
    DOMID_SELF,
    GUEST_READABLE,
    GUEST_SETTABLE,
    PARAMS,
    Errno,
    Hvm,
    HypercallError,
    Param,
)
from nonroot.xen.call import Call
from nonroot.xen.layout import HVM_PARAM, UPCALL_VECTOR
from nonroot.xen.shared import SharedInfo
from nonroot.xen.upcall import Upcalls

__all__ = ["HvmOps"]


class HvmOps:
    """The operations on one domain's parameters. In the vCPU's thread."""

    def __init__(
        self,
        shared: SharedInfo,
        upcalls: Upcalls,
        domid: int,
        now_ns: Callable[[], int],
        flush: Callable[[], object],
    ) -> None:
        self.params = [0] * PARAMS
        self._shared = shared
        self._upcalls = upcalls
        self._domid = domid
        self._now_ns = now_ns
        self._flush = flush

    def __call__(self, call: Call) -> int:
        """The hypercall."""
        command, pointer = call.args[0] & 0xFFFF_FFFF, call.args[1]
        if command in (Hvm.SET_PARAM, Hvm.GET_PARAM):
            return self._param(call, pointer, command == Hvm.SET_PARAM)
        if command == Hvm.SET_EVTCHN_UPCALL_VECTOR:
            vcpu, vector = UPCALL_VECTOR.unpack(call.read(pointer, UPCALL_VECTOR.size))
            if not self._upcalls.set_vector(vcpu, vector):
                raise HypercallError(Errno.EINVAL)
            return 0
        if command == Hvm.FLUSH_TLBS:
            if pointer:
                raise HypercallError(Errno.EINVAL)
            self._flush()
            return 0
        if command == Hvm.GET_TIME:
            call.write(pointer, struct.pack("<Q", self._now_ns()))
            return 0
        raise HypercallError(Errno.ENOSYS)

    def _param(self, call: Call, pointer: int, write: bool) -> int:
        domid, index, value = HVM_PARAM.unpack(call.read(pointer, HVM_PARAM.size))
        if domid not in (DOMID_SELF, self._domid):
            raise HypercallError(Errno.ESRCH)
        if index >= PARAMS:
            raise HypercallError(Errno.EINVAL)
        if index not in (GUEST_SETTABLE if write else GUEST_READABLE):
            raise HypercallError(Errno.EPERM)
        if not write:
            call.write(pointer, HVM_PARAM.pack(domid, index, self.params[index]))
            return 0
        self.params[index] = value
        if index == Param.CALLBACK_IRQ:
            self._shared.use_abi(call.abi)
            self._upcalls.set_callback(value)
        return 0
