//! The Python extension module `nonroot._engine`. Its interface, with its
//! documentation, is `src/nonroot/_engine.pyi`; this crate only translates.

mod companion;
mod confine;
mod coverage;
mod cpu_state;
mod exits;
mod ioreq;
mod memory;
mod msrs;
mod options;
mod translate;
mod vcpu;
mod xen;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

/// Guest software that `build.rs` assembled; empty if it could not.
static AGENT64: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent64"));
static AGENT32: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent32"));
static TINY_GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/tiny_guest"));

fn software<'py>(py: Python<'py>, bytes: &[u8], what: &str) -> PyResult<Bound<'py, PyBytes>> {
    if bytes.is_empty() {
        return Err(PyValueError::new_err(format!(
            "this build of nonroot has no {what}: the C compiler could not make it"
        )));
    }
    Ok(PyBytes::new(py, bytes))
}

/// The guest agent.
#[pyfunction]
fn agent(py: Python<'_>, bits: u32) -> PyResult<Bound<'_, PyBytes>> {
    match bits {
        64 => software(py, AGENT64, "64-bit guest agent"),
        32 => software(py, AGENT32, "32-bit guest agent"),
        _ => Err(PyValueError::new_err(format!("there is no guest agent of {bits} bits, only of 32 and 64"))),
    }
}

/// The built-in guest.
#[pyfunction]
fn tiny_guest(py: Python<'_>) -> PyResult<Bound<'_, PyBytes>> {
    software(py, TINY_GUEST, "built-in guest")
}

/// Optimisations that can be switched off.
#[pyfunction]
#[pyo3(signature = (translate = false))]
fn optimisations(translate: bool) -> Vec<(String, String)> {
    let all = nonroot_interpret::config::Optimisations::ALL;
    let more = if translate { translate::SWITCHES } else { &[] };
    let xen = if translate { xen::SWITCHES } else { &[] };
    all.iter()
        .chain(more)
        .chain(xen)
        .map(|(name, text)| (name.to_string(), text.trim().to_string()))
        .collect()
}

/// Why this machine cannot run translated code; None if it can.
#[pyfunction]
fn translate_unavailable() -> Option<String> {
    translate::available().err()
}

/// What the engine executes, by iced's instruction codes.
#[pyfunction(name = "coverage")]
fn code_coverage(py: Python<'_>) -> PyResult<Vec<(String, &'static str)>> {
    py.detach(coverage::coverage).map_err(PyRuntimeError::new_err)
}

#[pymodule]
fn _engine(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("VERSION", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<memory::Memory>()?;
    module.add_class::<vcpu::Vcpu>()?;
    module.add_class::<companion::Companion>()?;
    module.add_class::<xen::XenPath>()?;
    module.add_class::<ioreq::IoreqPages>()?;
    module.add_function(wrap_pyfunction!(agent, module)?)?;
    module.add_function(wrap_pyfunction!(tiny_guest, module)?)?;
    module.add_function(wrap_pyfunction!(optimisations, module)?)?;
    module.add_function(wrap_pyfunction!(translate_unavailable, module)?)?;
    module.add_function(wrap_pyfunction!(code_coverage, module)?)?;
    module.add_function(wrap_pyfunction!(confine::confinement_of_host, module)?)?;
    module.add_function(wrap_pyfunction!(confine::refuse_privileges, module)?)?;
    module.add_function(wrap_pyfunction!(confine::drop_capabilities, module)?)?;
    module.add_function(wrap_pyfunction!(confine::open_page_map, module)?)?;
    module.add_function(wrap_pyfunction!(confine::enter_namespaces, module)?)?;
    module.add_function(wrap_pyfunction!(confine::close_others, module)?)?;
    module.add_function(wrap_pyfunction!(confine::restrict_files, module)?)?;
    module.add_function(wrap_pyfunction!(confine::restrict_calls, module)?)?;
    Ok(())
}
