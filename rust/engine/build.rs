//! Assembles the software that runs inside guests from the sources in `guest/`: the agent (64- and 32-bit) and the
//! built-in guest. They land in `OUT_DIR` as `agent64`, `agent32` and `tiny_guest`, for `include_bytes!`.
//!
//! The host's C compiler does it, freestanding: nothing of the host's C library is used. A piece that this compiler
//! cannot make (no `-m32`, another architecture) becomes an empty file and a warning; the extension then says so when
//! that piece is asked for.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// For programs that start with nothing: no C library, no start files, no run-time support.
const FREESTANDING: &[&str] = &[
    "-std=gnu11",
    "-Os",
    "-ffreestanding",
    "-fno-builtin",
    "-fno-pic",
    "-fno-pie",
    "-no-pie",
    "-nostdlib",
    "-static",
    "-s",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
    "-fno-unwind-tables",
    "-fcf-protection=none",
    "-Wall",
    "-Wextra",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
];

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let guest = manifest.join("../../guest");
    let guest = guest.canonicalize().unwrap_or(guest);
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo:rerun-if-changed={}", guest.display());
    println!("cargo:rerun-if-env-changed=CC");

    let agent = [guest.join("agent.c")];
    build(&agent, &["-m64", "-Wl,-z,max-page-size=4096"], &out.join("agent64"));
    build(&agent, &["-m32", "-march=i686", "-Wl,-z,max-page-size=4096"], &out.join("agent32"));

    let tiny = guest.join("tiny");
    let script = format!("-Wl,-T,{}", tiny.join("tiny.ld").display());
    build(
        &["start.S", "main.c", "text.c", "machine.c"].map(|name| tiny.join(name)),
        &["-m64", "-mno-red-zone", "-mgeneral-regs-only", "-Wl,-z,max-page-size=4096", &script],
        &out.join("tiny_guest"),
    );
}

/// Compiles and links `sources` into `output`; an empty `output` and a warning if that is not possible here.
fn build(sources: &[PathBuf], flags: &[&str], output: &Path) {
    if let Err(reason) = compile(sources, flags, output) {
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        println!("cargo:warning=this build has no {name}: {reason}");
        fs::write(output, []).expect("OUT_DIR is writable");
    }
}

fn compile(sources: &[PathBuf], flags: &[&str], output: &Path) -> Result<(), String> {
    if let Some(missing) = sources.iter().find(|path| !path.exists()) {
        return Err(format!("{} is not there", missing.display()));
    }
    if env::var("CARGO_CFG_TARGET_ARCH").as_deref() != Ok("x86_64") {
        return Err("guests are x86, and this host's compiler is not".to_owned());
    }
    let compiler = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let result = Command::new(&compiler)
        .args(FREESTANDING)
        .args(flags)
        .args(sources)
        .arg("-o")
        .arg(output)
        .output()
        .map_err(|error| format!("{} cannot be run: {error}", compiler.to_string_lossy()))?;
    let messages = String::from_utf8_lossy(&result.stderr);
    if !result.status.success() {
        return Err(format!(
            "the C compiler refused it: {}",
            messages.lines().next().unwrap_or("no reason given")
        ));
    }
    for line in messages.lines() {
        println!("cargo:warning={line}");
    }
    Ok(())
}
