//! The arguments of `Vcpu(…)` as the interpreter's configuration.

use nonroot_interpret::config::{monotonic_ns, Config, CpuidLeaf, Optimisations};
use nonroot_interpret::state::Clock;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use std::collections::HashMap;

/// Which engine runs the vCPU, with its options.
#[derive(Clone, Debug, Default)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub struct Options {
    /// The interpreter's configuration; the translator falls back to it.
    pub config: Config,
    /// The translator is wanted.
    pub translate: bool,
    /// Every translated block is compared with the interpreter.
    pub lockstep: bool,
    /// Offers after which a block is translated; 0: the default.
    pub hot: u32,
    /// Instructions that user code runs before it gets windows; 0: the default.
    pub windows_after: u64,
    /// Names of its optimisations that are switched off.
    pub translate_off: Vec<String>,
}

/// One leaf: leaf, subleaf, EAX, EBX, ECX, EDX.
pub type Leaf = (u32, u32, u32, u32, u32, u32);

fn named<'py, T: FromPyObjectOwned<'py>>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<T> {
    value.extract().map_err(|_| {
        PyValueError::new_err(format!("the option {name} has a value of the wrong type or size"))
    })
}

/// Reads everything; refuses unknown options.
pub fn config(
    apic_id: u32,
    cpuid: Vec<Leaf>,
    msrs: HashMap<u32, (u64, u64)>,
    options: &Bound<'_, PyDict>,
) -> PyResult<Options> {
    let leaf = |&(leaf, subleaf, eax, ebx, ecx, edx): &Leaf| CpuidLeaf { leaf, subleaf, eax, ebx, ecx, edx };
    let mut config = Config {
        apic_id,
        cpuid: cpuid.iter().map(leaf).collect(),
        msrs,
        clock: Clock::Host { offset: (monotonic_ns() as i64).wrapping_neg() },
        ..Config::default()
    };
    let mut translate = false;
    let mut lockstep = false;
    let mut hot = 0;
    let mut windows_after = 0;
    let mut translate_off = Vec::new();
    for (key, value) in options {
        let name: String = key.extract()?;
        match name.as_str() {
            "tsc_khz" => config.tsc_khz = named(&name, &value)?,
            "apic_bus_hz" => config.apic_bus_hz = named(&name, &value)?,
            "msr_exits" => config.msr_exits = named(&name, &value)?,
            "exception_exits" => config.exception_exits = named(&name, &value)?,
            "cr_exits" => config.cr_exits = named(&name, &value)?,
            "audit" => config.audit = named(&name, &value)?,
            "random_seed" => config.random_seed = named(&name, &value)?,
            "translate" => translate = named(&name, &value)?,
            "lockstep" => lockstep = named(&name, &value)?,
            "translate_after" => hot = named(&name, &value)?,
            "windows_after" => windows_after = named(&name, &value)?,
            "virtual_time" => {
                if let Some((num, den)) = named::<Option<(u64, u64)>>(&name, &value)? {
                    if den == 0 || num == 0 || num > 1 << 32 || den > 1 << 32 {
                        return Err(PyValueError::new_err(
                            "virtual_time is a fraction of nanoseconds per instruction, both numbers from 1 to 2**32",
                        ));
                    }
                    config.clock = Clock::Virtual { base: 0, num, den };
                }
            }
            "off" => {
                for optimisation in named::<Vec<String>>(&name, &value)? {
                    if config.optimise.switch_off(&optimisation) {
                        continue;
                    }
                    if crate::xen::SWITCHES.iter().any(|(known, _)| *known == optimisation) {
                        // Whoever connects the vCPU with Xen looks there.
                        continue;
                    }
                    if crate::translate::is_switch(&optimisation) {
                        translate_off.push(optimisation);
                    } else {
                        let all = Optimisations::ALL
                            .iter()
                            .chain(crate::translate::SWITCHES)
                            .chain(crate::xen::SWITCHES);
                        let all: Vec<&str> = all.map(|(name, _)| *name).collect();
                        return Err(PyValueError::new_err(format!(
                            "there is no optimisation named {optimisation}, only {}",
                            all.join(", ")
                        )));
                    }
                }
            }
            _ => return Err(PyValueError::new_err(format!("there is no engine option named {name}"))),
        }
    }
    if !(1_000..=100_000_000).contains(&config.tsc_khz) {
        return Err(PyValueError::new_err(format!("a TSC of {} kHz makes no sense", config.tsc_khz)));
    }
    if !(1_000..=10_000_000_000).contains(&config.apic_bus_hz) {
        return Err(PyValueError::new_err(format!(
            "an APIC bus clock of {} Hz makes no sense",
            config.apic_bus_hz
        )));
    }
    Ok(Options { config, translate, lockstep, hot, windows_after, translate_off })
}
