//! Runs machine-code test cases on the host CPU, in ring 3, and reports the complete resulting state:
//! the judge of the interpreter's instructions. Cases come on standard input and results go to
//! standard output; `layout.rs` describes both.
//!
//! Each batch runs in a forked child. A case that kills the child is reported as such, and the rest of
//! the batch goes on in a new child.

#[cfg(target_arch = "x86_64")]
#[allow(dead_code)]
mod layout;
#[cfg(target_arch = "x86_64")]
mod runner;
#[cfg(target_arch = "x86_64")]
mod trampoline;

#[cfg(target_arch = "x86_64")]
mod batches {
    use crate::layout::*;
    use crate::runner::{features, Runner};
    use std::io::{Read, Write};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Address space for the results of a batch; only what is used costs memory.
    const RESULT_SPACE: usize = 1 << 30;
    const MAX_INPUT: usize = 1 << 28;

    /// Memory that the child fills and the parent reads.
    struct Shared {
        base: *mut u8,
    }

    impl Shared {
        fn new() -> Result<Shared, String> {
            // SAFETY: a fresh anonymous mapping.
            let base = unsafe {
                let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                libc::mmap(
                    std::ptr::null_mut(),
                    RESULT_SPACE,
                    libc::PROT_READ | libc::PROT_WRITE,
                    flags,
                    -1,
                    0,
                )
            };
            if base == libc::MAP_FAILED {
                return Err(format!("cannot map the results: {}", std::io::Error::last_os_error()));
            }
            Ok(Shared { base: base as *mut u8 })
        }

        /// Cases finished (word 0) and bytes of results (word 1).
        fn word(&self, n: usize) -> &AtomicU64 {
            // SAFETY: the mapping is page-aligned and its first 16 bytes are only used as these words.
            unsafe { &*(self.base as *const AtomicU64).add(n) }
        }

        fn append(&self, record: &[u8]) -> Result<(), String> {
            let used = self.word(1).load(Ordering::SeqCst) as usize;
            if 16 + used + record.len() > RESULT_SPACE {
                return Err("the results of a batch do not fit: send fewer cases".into());
            }
            // SAFETY: checked to lie inside the mapping; parent and child never write at the same time.
            unsafe { std::ptr::copy_nonoverlapping(record.as_ptr(), self.base.add(16 + used), record.len()) };
            self.word(1).store((used + record.len()) as u64, Ordering::SeqCst);
            self.word(0).fetch_add(1, Ordering::SeqCst);
            Ok(())
        }

        fn results(&self) -> &[u8] {
            let used = self.word(1).load(Ordering::SeqCst) as usize;
            // SAFETY: `append` keeps `used` inside the mapping; no child runs while the slice lives.
            unsafe { std::slice::from_raw_parts(self.base.add(16), used) }
        }
    }

    fn split(mut cases: &[u8], count: usize) -> Result<Vec<&[u8]>, String> {
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            if cases.len() < CASE_HEADER || (get32(cases, 0) as usize) < CASE_HEADER {
                return Err("a case is shorter than its header".into());
            }
            let (case, rest) =
                cases.split_at_checked(get32(cases, 0) as usize).ok_or("the batch ends inside a case")?;
            list.push(case);
            cases = rest;
        }
        Ok(list)
    }

    fn child(cases: &[&[u8]], template: &[u8], shared: &Shared) -> Result<(), String> {
        let mut runner = Runner::new()?;
        let mut record = Vec::new();
        for case in cases {
            record.clear();
            runner.run(case, template, &mut record)?;
            shared.append(&record)?;
        }
        Ok(())
    }

    fn batch(cases: &[&[u8]], template: &[u8], shared: &Shared) -> Result<(), String> {
        shared.word(0).store(0, Ordering::SeqCst);
        shared.word(1).store(0, Ordering::SeqCst);
        loop {
            let done = shared.word(0).load(Ordering::SeqCst) as usize;
            if done == cases.len() {
                return Ok(());
            }
            // SAFETY: this process has one thread, so the child may do anything.
            let pid = unsafe { libc::fork() };
            if pid < 0 {
                return Err(format!("cannot fork: {}", std::io::Error::last_os_error()));
            }
            if pid == 0 {
                let status = match child(&cases[done..], template, shared) {
                    Ok(()) => 0,
                    Err(message) => {
                        eprintln!("nonroot-hostcpu: {message}");
                        99
                    }
                };
                // SAFETY: ends the child without flushing what belongs to the parent.
                unsafe { libc::_exit(status) };
            }
            let mut status = 0;
            // SAFETY: waits for the child just made.
            unsafe { libc::waitpid(pid, &mut status, 0) };
            if libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 99 {
                return Err("a batch could not be run".into());
            }
            if status != 0 {
                let mut record = vec![0u8; RESULT_HEADER];
                record[..4].copy_from_slice(&(RESULT_HEADER as u32).to_le_bytes());
                record[4] = 2;
                record[8..12].copy_from_slice(&status.to_le_bytes());
                shared.append(&record)?;
            }
        }
    }

    /// Linux keeps the CPU's number in a segment's limit, which cases can read.
    fn stay_on_one_cpu() {
        // SAFETY: the set is plain data, filled before use; a failure changes nothing.
        unsafe {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
    }

    /// Serves batches until standard input ends.
    pub fn serve() -> Result<(), String> {
        let io = |e: std::io::Error| format!("the pipe broke: {e}");
        let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
        let shared = Shared::new()?;
        stay_on_one_cpu();
        let mut hello = b"NRHC".to_vec();
        for word in [1, features(), 0] {
            hello.extend_from_slice(&word.to_le_bytes());
        }
        output.write_all(&hello).and_then(|()| output.flush()).map_err(io)?;
        loop {
            let mut header = [0; 16];
            match input.read_exact(&mut header) {
                Ok(()) => {}
                Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(io(e)),
            }
            let (count, bytes) = (get32(&header, 4) as usize, get32(&header, 8) as usize);
            if &header[..4] != b"BTCH" || bytes > MAX_INPUT {
                return Err("this is not a batch of cases".into());
            }
            let mut template = vec![0; DATA_BYTES];
            input.read_exact(&mut template).map_err(io)?;
            let mut cases = vec![0; bytes];
            input.read_exact(&mut cases).map_err(io)?;
            batch(&split(&cases, count)?, &template, &shared)?;
            let results = shared.results();
            let mut header = b"RSLT".to_vec();
            for word in [count as u32, results.len() as u32, 0] {
                header.extend_from_slice(&word.to_le_bytes());
            }
            output.write_all(&header).and_then(|()| output.write_all(results)).map_err(io)?;
            output.flush().map_err(io)?;
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn main() {
    if let Err(message) = batches::serve() {
        eprintln!("nonroot-hostcpu: {message}");
        std::process::exit(1);
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    eprintln!("nonroot-hostcpu: this host is not an x86-64");
    std::process::exit(1);
}
