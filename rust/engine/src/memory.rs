//! `Memory`: guest memory and the p2m.

use nonroot_memory::{MemoryError, P2M_WRITABLE, PAGE_SIZE};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::sync::Arc;

/// Guest memory of one domain.
#[pyclass(frozen, module = "nonroot._engine")]
pub struct Memory {
    pub inner: Arc<nonroot_memory::Memory>,
}

/// OSError with its errno, as Python's own calls raise it.
fn os_error(errno: i32) -> PyErr {
    // SAFETY: strerror returns a valid C string for every number; it is copied while the GIL is held.
    let text = unsafe { std::ffi::CStr::from_ptr(libc::strerror(errno)) };
    PyOSError::new_err((errno, text.to_string_lossy().into_owned()))
}

fn error(error: MemoryError) -> PyErr {
    match error {
        MemoryError::OutOfRange => {
            PyValueError::new_err("the guest-physical range is beyond the 40-bit address space")
        }
        MemoryError::BadBacking => PyValueError::new_err(
            "the range is not inside the backing (offsets are multiples of 4096, backings numbered from 0)",
        ),
        MemoryError::NotRam(gpa) => {
            PyValueError::new_err(format!("guest-physical address {gpa:#x} is not RAM"))
        }
        MemoryError::System(errno) => os_error(errno),
    }
}

#[pymethods]
impl Memory {
    #[new]
    fn new() -> Self {
        Memory { inner: Arc::new(nonroot_memory::Memory::new()) }
    }

    #[pyo3(signature = (fd, size, offset = 0, private = false))]
    fn add_backing(&self, fd: i32, size: u64, offset: u64, private: bool) -> PyResult<usize> {
        if size == 0 || size % PAGE_SIZE != 0 || size > 1 << 46 {
            return Err(PyValueError::new_err(format!(
                "a backing of {size} bytes is no multiple of 4096 bytes, or too large"
            )));
        }
        if offset % PAGE_SIZE != 0 || offset > 1 << 46 {
            return Err(PyValueError::new_err(format!("{offset} is no place for a backing's beginning")));
        }
        // A shorter file would be mapped too, and kill us at the first access beyond its end.
        let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
        // SAFETY: `stat` is a valid place for fstat to write to; any descriptor number may be asked about.
        let (result, length) = unsafe {
            let result = libc::fstat(fd, stat.as_mut_ptr());
            (result, stat.assume_init().st_size)
        };
        if result != 0 {
            return Err(os_error(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)));
        }
        if (length as u64) < offset + size {
            return Err(PyValueError::new_err(format!(
                "the backing's file has {length} bytes, not the {size} to map"
            )));
        }
        self.inner.add_backing_at(fd, offset, size, private).map_err(error)
    }

    fn remap(&self, backing: usize, fd: i32, offset: u64, private: bool) -> PyResult<()> {
        self.inner.remap(backing, fd, offset, private).map_err(error)
    }

    fn remap_part(
        &self,
        backing: usize,
        start: u64,
        length: u64,
        fd: i32,
        offset: u64,
        private: bool,
    ) -> PyResult<()> {
        self.inner.remap_part(backing, start, Some(length), fd, offset, private).map_err(error)
    }

    fn revert(&self, backing: usize) -> PyResult<()> {
        self.inner.revert(backing).map_err(error)
    }

    #[pyo3(signature = (backing, fd, gap = 0))]
    fn write_private(&self, py: Python<'_>, backing: usize, fd: i32, gap: u64) -> PyResult<Vec<(u64, u64)>> {
        py.detach(|| self.inner.write_private(backing, fd, gap)).map_err(error)
    }

    #[pyo3(signature = (gfn, count, backing, offset, writable = true))]
    fn map(&self, gfn: u64, count: u64, backing: usize, offset: u64, writable: bool) -> PyResult<()> {
        let flags = if writable { P2M_WRITABLE } else { 0 };
        self.inner.map(gfn, count, backing, offset, flags).map_err(error)
    }

    fn unmap(&self, gfn: u64, count: u64) -> PyResult<()> {
        let end = gfn.checked_add(count).filter(|&end| end <= 1 << 28);
        end.ok_or_else(|| error(MemoryError::OutOfRange))?;
        self.inner.unmap(gfn, count);
        Ok(())
    }

    fn lookup(&self, gfn: u64) -> Option<(usize, u64, bool)> {
        self.inner.lookup(gfn).map(|run| (run.backing, run.offset, run.flags & P2M_WRITABLE != 0))
    }

    fn runs(&self) -> Vec<(u64, u64, usize, u64, bool)> {
        let runs = self.inner.runs();
        runs.iter().map(|r| (r.gfn, r.count, r.backing, r.offset, r.flags & P2M_WRITABLE != 0)).collect()
    }

    fn addresses(&self) -> Vec<u64> {
        self.inner.addresses()
    }

    fn generation(&self) -> u64 {
        self.inner.generation()
    }

    fn read<'py>(&self, py: Python<'py>, gpa: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        if length > 1 << 40 {
            return Err(error(MemoryError::OutOfRange));
        }
        PyBytes::new_with(py, length, |out| self.inner.read(gpa, out).map_err(error))
    }

    fn write(&self, py: Python<'_>, gpa: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        if let Ok(bytes) = data.cast::<PyBytes>() {
            return self.inner.write(gpa, bytes.as_bytes()).map_err(error);
        }
        let buffer = PyBuffer::<u8>::get(data)?;
        if buffer.item_count() == 0 {
            return Ok(());
        }
        if !buffer.is_c_contiguous() {
            return self.inner.write(gpa, &buffer.to_vec(py)?).map_err(error);
        }
        // SAFETY: the buffer is contiguous, has items of one byte and stays exported while `buffer` lives;
        // the GIL is held, so no other Python code changes it during the copy.
        let bytes = unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast::<u8>(), buffer.item_count()) };
        self.inner.write(gpa, bytes).map_err(error)
    }

    fn read_file(&self, py: Python<'_>, fd: i32, offset: u64, parts: Vec<(u64, u64)>) -> PyResult<usize> {
        py.detach(|| self.inner.read_file(fd, offset, &parts)).map_err(error)
    }

    fn touch(&self, gfn: u64) {
        self.inner.touch(gfn);
    }

    fn foreign(&self, gfn: u64, on: bool) {
        self.inner.foreign(gfn, on);
    }

    fn compare_exchange(&self, backing: usize, offset: u64, expected: u32, new: u32) -> PyResult<u32> {
        self.inner.compare_exchange(backing, offset, expected, new).map_err(error)
    }

    fn take_dirty(&self) -> Vec<u64> {
        self.inner.take_dirty()
    }

    fn take_dirty_in(&self, gfn: u64, count: u64) -> Vec<u64> {
        self.inner.take_dirty_in(gfn, count)
    }
}
