//! The translator, where the host is one that it is for.

#[cfg(target_arch = "x86_64")]
mod imp {
    use crate::options::Options;
    use nonroot_interpret::Vcpu;
    use nonroot_translate::{Switches, Translator};

    /// (name, description) of the translator's optimisations.
    pub const SWITCHES: &[(&str, &str)] = Switches::ALL;

    /// Whether this host can run translated code, or why not.
    pub fn available() -> Result<(), String> {
        nonroot_translate::available()
    }

    /// Gives a vCPU a translator.
    pub fn attach(vcpu: &mut Vcpu, options: &Options) -> Result<(), String> {
        let mut switches = Switches::default();
        for name in &options.translate_off {
            switches.switch_off(name);
        }
        let mut translator = Translator::new(switches)?;
        if options.hot != 0 {
            translator.set_hot(options.hot);
        }
        if options.windows_after != 0 {
            translator.set_patience(options.windows_after);
        }
        if options.lockstep {
            translator.set_lockstep();
        }
        vcpu.cpu.accelerator = Some(Box::new(translator));
        Ok(())
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod imp {
    use crate::options::Options;
    use nonroot_interpret::Vcpu;

    /// There are none.
    pub const SWITCHES: &[(&str, &str)] = &[];

    /// Whether this host can run translated code, or why not.
    pub fn available() -> Result<(), String> {
        Err("translated code runs on x86-64 hosts only".to_string())
    }

    /// Gives a vCPU a translator.
    pub fn attach(_: &mut Vcpu, _: &Options) -> Result<(), String> {
        available()
    }
}

pub use imp::*;

/// Whether the translator has an optimisation of that name.
pub fn is_switch(name: &str) -> bool {
    SWITCHES.iter().any(|(known, _)| *known == name)
}
