//! Landlock: which files can be reached by name.

use landlock::{
    make_bitflags, Access, AccessFs, AccessNet, BitFlags, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope, ABI,
};
use std::os::fd::{BorrowedFd, RawFd};

/// The newest version whose restrictions were tried; what an older kernel lacks of them is left out.
const VERSION: ABI = ABI::V7;
const GET_VERSION: libc::c_uint = 1;

/// What may be done with a file, or below a folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Below {
    /// Read files.
    Read,
    /// Read files and folders.
    List,
    /// Everything but running programs and making device files.
    Change,
    /// Make, read, write, and remove plain files and sockets.
    Own,
}

impl Below {
    /// By its name, in small letters.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "read" => Self::Read,
            "list" => Self::List,
            "change" => Self::Change,
            "own" => Self::Own,
            _ => return None,
        })
    }

    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Read => AccessFs::ReadFile.into(),
            Self::List => AccessFs::ReadFile | AccessFs::ReadDir,
            Self::Change => {
                AccessFs::from_all(VERSION) & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock)
            }
            Self::Own => make_bitflags!(AccessFs::{
                ReadFile | WriteFile | Truncate | ReadDir | RemoveFile | MakeReg | MakeSock
            }),
        }
    }
}

/// The kernel's version of Landlock; 0 if it has none, or was started without.
pub fn landlock_version() -> i32 {
    // SAFETY: with a null pointer, size 0 and this flag the call does nothing but to answer.
    let answer = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0usize, 0usize, GET_VERSION) };
    i32::try_from(answer).unwrap_or(0).max(0)
}

/// Leaves this thread, and those that it starts, only the files that `rules` name; without `tcp`, no TCP ports either.
///
/// Signals to processes outside and abstract sockets of theirs are refused too, where the kernel knows that. An error
/// is half a sentence.
pub fn restrict_files(rules: &[(RawFd, Below)], tcp: bool) -> Result<(), String> {
    let failed = |error: &dyn std::fmt::Display| format!("Landlock: {error}");
    let mut ruleset =
        Ruleset::default().handle_access(AccessFs::from_all(VERSION)).map_err(|e| failed(&e))?;
    if !tcp {
        ruleset = ruleset.handle_access(AccessNet::from_all(VERSION)).map_err(|e| failed(&e))?;
    }
    let ruleset = ruleset.scope(Scope::from_all(VERSION)).map_err(|e| failed(&e))?;
    let mut created = ruleset.create().map_err(|e| failed(&e))?;
    for &(fd, below) in rules {
        if fd < 0 {
            return Err(format!("Landlock: {fd} is no descriptor"));
        }
        // SAFETY: the caller has it open during this call; a bad number is refused by the kernel.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        created = created.add_rule(PathBeneath::new(fd, below.rights())).map_err(|e| failed(&e))?;
    }
    let status = created.restrict_self().map_err(|e| failed(&e))?;
    match status.ruleset {
        RulesetStatus::NotEnforced => Err("Landlock: the kernel has none".to_string()),
        _ => Ok(()),
    }
}
