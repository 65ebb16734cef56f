"""Machines that are saved and restored, without processes around them."""

import mmap
import os
from dataclasses import replace
from pathlib import Path

from nonroot.engines.protocol import Engine
from nonroot.hvm.machine import Machine, MachineConfig, Outputs
from nonroot.hvm.ram import data_extents, ram_file
from nonroot.hvm.saved import restore, take
from nonroot.saved.container import Reader, Writer


class Recorded:
    """A machine and what its console has shown."""

    def __init__(self, config: MachineConfig, engine: Engine) -> None:
        self.config = config
        self.output = bytearray()
        self.machine = Machine(config, engine, Outputs(self._show))

    def _show(self, number: int, data: bytes) -> None:
        if number == 0:
            self.output += data

    def save(self, path: Path, packed: bool = True) -> None:
        with Writer(path, packed) as writer:
            for name, record in take(self.machine).items():
                writer.record(name, record)
            fd = ram_file(self.machine.memory_files)
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as contents, memoryview(contents) as view:
                writer.memory("ram", view, data_extents(fd))
            os.close(fd)

    def restored(self, path: Path, engine: Engine) -> "Recorded":
        """Another machine that goes on from ``path``."""
        config = replace(self.config, kernel=b"", initrd=None, resumed=True, protocol=self.machine.protocol)
        other = Recorded(config, engine)
        fd = ram_file(other.machine.memory_files)
        with Reader(path) as reader:
            for run in reader.runs("ram"):
                os.pwrite(fd, run.contents, run.first * 4096)
            restore(other.machine, {name: reader.record(name) for name in reader.names})
        os.close(fd)
        return other
