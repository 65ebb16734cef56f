//! Model-specific registers in state records: those of the policy, and those
//! that the interpreter keeps itself.

use nonroot_interpret::cpu::Cpu;
use std::collections::BTreeMap;

/// All of them by index.
pub fn read(cpu: &Cpu) -> BTreeMap<u32, u64> {
    cpu.config.msrs.iter().map(|(&index, &(value, _))| (index, value)).collect()
}

/// Checks a record's registers against this vCPU's.
pub fn check(cpu: &Cpu, msrs: &BTreeMap<u32, u64>) -> Result<(), String> {
    let own = read(cpu);
    for index in msrs.keys() {
        if !own.contains_key(index) {
            return Err(format!("the vCPU state's MSR {index:#x} is none that this vCPU has"));
        }
    }
    Ok(())
}

/// Applies a record that [`check`] passed.
pub fn write(cpu: &mut Cpu, msrs: &BTreeMap<u32, u64>) {
    for (index, &value) in msrs {
        if let Some(entry) = cpu.config.msrs.get_mut(index) {
            entry.0 = value;
        }
    }
}
