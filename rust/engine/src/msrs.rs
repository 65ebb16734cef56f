//! Model-specific registers in state records: those of the policy, and those
//! that the interpreter keeps itself.

use nonroot_interpret::cpu::Cpu;
use std::collections::BTreeMap;

/// All of them by index.
pub fn read(cpu: &Cpu) -> BTreeMap<u32, u64> {
    cpu.saved_msrs()
}

/// Loads a record's registers; if one is refused, nothing has changed.
pub fn write(cpu: &mut Cpu, msrs: &BTreeMap<u32, u64>) -> Result<(), String> {
    let own = read(cpu);
    if let Some(index) = msrs.keys().find(|index| !own.contains_key(index)) {
        return Err(format!("the vCPU state's MSR {index:#x} is none that this vCPU has"));
    }
    if let Some(index) = own.keys().find(|index| !msrs.contains_key(index)) {
        return Err(format!("the vCPU state has no value for this vCPU's MSR {index:#x}"));
    }
    let before = cpu.msr.clone();
    for (&index, &value) in msrs {
        if cpu.restore_msr(index, value).is_err() {
            cpu.msr = before;
            return Err(format!("the vCPU state's MSR {index:#x} is not possible"));
        }
    }
    Ok(())
}
