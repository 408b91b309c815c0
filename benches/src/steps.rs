//! Counts instructions by stepping through them. That needs no counter of the processor, and gives
//! the same number on a busy machine.
//!
//! `forebay-steps trace COUNTS COMMAND...` runs a command. It steps the command's first thread from
//! each `SIGUSR1` that the thread raises to the next `SIGUSR2`. It writes the counts to `COUNTS` as
//! a JSON list, in order.
//!
//! `forebay-steps work FOLDER` is such a command. It runs each hot path of the loader several times
//! over the corpora of a folder, and prints the names of the paths in the same order.
//!
//! Time in the kernel and in other threads does not count. A repeated string instruction counts
//! once for each repetition. Therefore the C library is told not to copy with these instructions
//! (`GLIBC_TUNABLES`).

use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::time::Duration;

use forebay::corpus::discover::ShardFile;
use forebay::format::{self, OpenOptions, Shard};
use forebay::order::{Arrangement, EpochOrder};
use forebay::settings::{Config, Shuffle, Targets};
use forebay::{Loader, Next};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Number of runs. The smallest count is used. It excludes work that happens only once and
/// work that a busy machine adds.
const REPEATS: usize = 2;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["trace", counts, command @ ..] if !command.is_empty() => trace(Path::new(counts), command),
        ["work", folder] => work(Path::new(folder)),
        _ => Err("usage: forebay-steps trace COUNTS COMMAND... | work FOLDER".into()),
    }
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn trace(_counts: &Path, _command: &[&str]) -> Result<()> {
    Err("stepping is written for Linux on x86-64 alone".into())
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn trace(counts: &Path, command: &[&str]) -> Result<()> {
    use std::os::unix::process::CommandExt;
    use std::ptr::null_mut;

    let mut child = std::process::Command::new(command[0]);
    child.args(&command[1..]).env("GLIBC_TUNABLES", tunables());
    // SAFETY: this system call is the only work between fork and exec.
    unsafe {
        child.pre_exec(|| match libc::ptrace(libc::PTRACE_TRACEME, 0, null_mut::<u8>(), null_mut::<u8>()) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    let pid = child.spawn().map_err(|error| format!("cannot trace {}: {error}", command[0]))?.id() as libc::pid_t;
    let mut found: Vec<u64> = Vec::new();
    let mut stepping = false;
    let (mut cores, mut own) = (none(), none());
    loop {
        let mut status = 0;
        // SAFETY: the call waits for our own child and writes its status.
        if unsafe { libc::waitpid(pid, &mut status, libc::__WALL) } < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            std::fs::write(counts, serde_json::to_string(&found)?)?;
            let code = if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) };
            std::process::exit(code);
        }
        let passed_on = match libc::WSTOPSIG(status) {
            libc::SIGTRAP => {
                if let (true, Some(count)) = (stepping, found.last_mut()) {
                    *count += 1;
                }
                0
            }
            libc::SIGUSR1 => {
                stepping = true;
                found.push(0);
                // On one core, a step is a switch between two threads. On two cores it would also
                // signal the other core.
                // SAFETY: the call only returns a number.
                let core = unsafe { libc::sched_getcpu() }.max(0) as usize;
                (cores, own) = (affinity(pid), affinity(0));
                let mut one: libc::cpu_set_t = none();
                // SAFETY: the call sets a bit of a plain C struct, and the core exists.
                unsafe { libc::CPU_SET(core, &mut one) };
                set_affinity(pid, &one);
                set_affinity(0, &one);
                0
            }
            libc::SIGUSR2 => {
                stepping = false;
                set_affinity(pid, &cores);
                set_affinity(0, &own);
                0
            }
            other => other,
        };
        let request = if stepping { libc::PTRACE_SINGLESTEP } else { libc::PTRACE_CONT };
        // SAFETY: the process is our own child and is stopped. The call gets no memory.
        if unsafe { libc::ptrace(request, pid, null_mut::<u8>(), passed_on as usize) } < 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn none() -> libc::cpu_set_t {
    // SAFETY: the type is a plain C struct of bits, for which all-zero bytes are a valid value.
    unsafe { std::mem::zeroed() }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn affinity(thread: libc::pid_t) -> libc::cpu_set_t {
    let mut cores = none();
    // SAFETY: the call writes one set of cores, and the pointer points to one.
    unsafe { libc::sched_getaffinity(thread, size_of_val(&cores), &mut cores) };
    cores
}

/// Best effort: the counts are the same without it.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn set_affinity(thread: libc::pid_t, cores: &libc::cpu_set_t) {
    // SAFETY: the call reads one set of cores.
    unsafe { libc::sched_setaffinity(thread, size_of_val(cores), cores) };
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn tunables() -> String {
    const NEVER: u64 = 1 << 40;
    format!("glibc.cpu.x86_rep_movsb_threshold={NEVER}:glibc.cpu.x86_rep_stosb_threshold={NEVER}")
}

/// Runs `run` between two marks, and prints its name.
fn marked<T>(name: &str, mut run: impl FnMut() -> Result<T>) -> Result<()> {
    for _ in 0..REPEATS {
        once(name, &mut run)?;
    }
    Ok(())
}

fn once<T>(name: &str, run: &mut impl FnMut() -> Result<T>) -> Result<()> {
    mark(libc::SIGUSR1);
    let done = black_box(run());
    mark(libc::SIGUSR2);
    println!("{name}");
    done.map(drop)
}

fn mark(signal: i32) {
    // SAFETY: the tracer takes both signals away before they are delivered.
    unsafe { libc::raise(signal) };
}

fn work(folder: &Path) -> Result<()> {
    // Without a tracer, the marks would end this process.
    let status = std::fs::read_to_string("/proc/self/status")?;
    if status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|pid| pid.trim() == "0")) {
        return Err("`work` is to be run by `forebay-steps trace`".into());
    }
    marked("nothing", || Ok(()))?;
    let order = EpochOrder::new(1_000_000_007, Arrangement::Global, 7, 0);
    let mut position = 0;
    marked("permutation, 100 rows", || {
        for _ in 0..100 {
            black_box(order.sequence_at(black_box(position)));
            position += 1;
        }
        Ok(())
    })?;
    for name in ["arrow-uint16", "arrow-int32"] {
        let loader = open(folder, name, Targets::Labels)?;
        marked(&format!("batch of 8 x 2048, {name}"), || Ok(loader.batch_at(0, 1, 0, 1)?))?;
    }
    let shifted = open(folder, "arrow-uint16", Targets::Shifted)?;
    marked("batch of 8 x 2048, arrow-uint16, shifted", || Ok(shifted.batch_at(0, 1, 0, 1)?))?;
    let loader = open(folder, "arrow-uint16", Targets::Labels)?;
    let batches = loader.iter();
    for _ in 0..10 {
        // Wait until the next batches are ready.
        std::thread::sleep(Duration::from_millis(5));
        once("hand-over of a ready batch", &mut || match batches.next_timeout(Duration::MAX)? {
            Next::Batch(batch) => Ok(batch),
            Next::End | Next::Pending => Err("the epoch has ended".into()),
        })?;
    }
    loader.close();
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(folder.join("parquet"))?.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    for path in files {
        let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let file = ShardFile { path, name: name.clone() };
        let shard = format::open(&file.path, &OpenOptions::of(&Config::default()))?;
        let Shard::Block(shard) = shard else { return Err("its blocks are not decoded".into()) };
        marked(&format!("decoding {} tokens, {name}", shard.blocks()[0].tokens), || Ok(shard.decode(0, None)?))?;
    }
    Ok(())
}

fn open(folder: &Path, name: &str, targets: Targets) -> Result<Loader> {
    Ok(Loader::open(Config {
        data: vec![folder.join(name).to_string_lossy().into_owned()],
        seq_len: 2048,
        batch_size: 8,
        targets,
        shuffle: Shuffle::Global,
        num_threads: Some(1),
        ..Config::default()
    })?)
}
