//! Confinement of this process; see the crate `nonroot-confine`.

use nonroot_confine::{Below, Rules};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

fn os_error(error: std::io::Error, what: &str) -> PyErr {
    PyOSError::new_err((error.raw_os_error().unwrap_or(0), format!("{what}: {error}")))
}

/// (Landlock's version, whether there is seccomp).
#[pyfunction]
pub fn confinement_of_host() -> (i32, bool) {
    (nonroot_confine::landlock_version(), nonroot_confine::seccomp_is_there())
}

/// No new privileges, and no looks from outside.
#[pyfunction]
pub fn refuse_privileges() -> PyResult<()> {
    nonroot_confine::refuse_privileges().map_err(|error| os_error(error, "privileges cannot be given up"))
}

/// Gives up capabilities.
#[pyfunction]
pub fn drop_capabilities(keep: u64) -> PyResult<()> {
    nonroot_confine::drop_capabilities(keep)
        .map_err(|error| os_error(error, "capabilities cannot be given up"))
}

/// Opens this process's table of pages.
#[pyfunction]
pub fn open_page_map() -> PyResult<()> {
    nonroot_memory::page_map().map(drop).map_err(|error| os_error(error, "its pages cannot be seen"))
}

/// Enters namespaces of its own.
#[pyfunction]
pub fn enter_namespaces() -> PyResult<()> {
    nonroot_confine::enter_namespaces().map_err(|error| os_error(error, "namespaces"))
}

/// Closes other descriptors.
#[pyfunction]
pub fn close_others(first: u32, keep: Vec<i32>) -> PyResult<()> {
    nonroot_confine::close_others(first, &keep)
        .map_err(|error| os_error(error, "descriptors cannot be closed"))
}

/// Landlock.
#[pyfunction]
pub fn restrict_files(rules: Vec<(i32, String)>, tcp: bool) -> PyResult<()> {
    let rules: PyResult<Vec<(i32, Below)>> = rules
        .into_iter()
        .map(|(fd, name)| {
            let below =
                Below::named(&name).ok_or_else(|| PyValueError::new_err(format!("{name:?} is no access")))?;
            Ok((fd, below))
        })
        .collect();
    nonroot_confine::restrict_files(&rules?, tcp).map_err(PyOSError::new_err)
}

/// seccomp.
#[pyfunction]
#[pyo3(signature = (calls, *, refuse, threads, executable, families, all_threads))]
pub fn restrict_calls(
    calls: Vec<String>,
    refuse: bool,
    threads: bool,
    executable: bool,
    families: Vec<i32>,
    all_threads: bool,
) -> PyResult<()> {
    if let Some(name) = calls.iter().find(|name| !nonroot_confine::known(name)) {
        return Err(PyValueError::new_err(format!("there is no system call {name:?}")));
    }
    let rules = Rules { calls, refuse, threads, executable, families, all_threads };
    nonroot_confine::restrict_calls(&rules).map_err(PyOSError::new_err)
}
