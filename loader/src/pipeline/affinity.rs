//! Chooses the processors of the worker threads, and lowers the priority of these threads.
//!
//! Opening a loader checks the settings against what the process may do. Each worker then applies
//! them to itself. Only Linux offers both for single threads.

#[cfg(not(target_os = "linux"))]
use crate::error::Error;
use crate::error::Result;
use crate::settings::Config;

/// The processors and the priority that a worker gives itself.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placement {
    cpus: Option<Vec<u64>>,
    nice: u64,
}

impl Placement {
    /// Takes the settings from `config`. Fails if this process cannot follow them.
    #[cfg(target_os = "linux")]
    pub(crate) fn of(config: &Config) -> Result<Self> {
        if let Some(cpus) = &config.cpu_affinity {
            linux::check(cpus)?;
        }
        Ok(Self { cpus: config.cpu_affinity.clone(), nice: config.thread_priority })
    }

    /// Takes the settings from `config`. Fails if this process cannot follow them.
    #[cfg(not(target_os = "linux"))]
    pub(crate) fn of(config: &Config) -> Result<Self> {
        if config.cpu_affinity.is_some() {
            return Err(Error::config("`cpu_affinity` works on Linux only: leave it out on this system"));
        }
        if config.thread_priority != 0 {
            return Err(Error::config("`thread_priority` works on Linux only: leave it out on this system"));
        }
        Ok(Self::default())
    }

    /// Applies the settings to the calling thread.
    pub(crate) fn apply(&self) {
        #[cfg(target_os = "linux")]
        {
            if let Some(cpus) = &self.cpus {
                linux::pin(cpus);
            }
            if self.nice > 0 {
                linux::lower(self.nice);
            }
        }
        #[cfg(not(target_os = "linux"))]
        let _ = (&self.cpus, self.nice);
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use crate::error::{Error, Result};
    use crate::settings::{MOST_CPUS, cpus_text};

    /// A set of processors with one bit for each, in the form of the system call.
    type Mask = [u64; MOST_CPUS as usize / 64];

    /// The processors that the calling thread may run on. `None` if the system does not tell.
    pub(super) fn allowed() -> Option<Vec<u64>> {
        let mut mask: Mask = [0; MOST_CPUS as usize / 64];
        // SAFETY: the call writes to the mask at most the given size, which is the mask's size. Any
        // bits are valid.
        let got = unsafe { libc::sched_getaffinity(0, size_of::<Mask>(), mask.as_mut_ptr().cast()) };
        let is_set = |cpu: &u64| mask[(cpu / 64) as usize] >> (cpu % 64) & 1 == 1;
        (got == 0).then(|| (0..MOST_CPUS).filter(is_set).collect())
    }

    pub(super) fn check(cpus: &[u64]) -> Result<()> {
        // If the system does not tell, pinning fails later in single workers, which then run
        // anywhere.
        let Some(allowed) = allowed() else { return Ok(()) };
        let missing: Vec<u64> = cpus.iter().copied().filter(|cpu| allowed.binary_search(cpu).is_err()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::config(format!(
            "`cpu_affinity` names CPUs that this process may not run on: {}; it may run on {}",
            cpus_text(&missing),
            cpus_text(&allowed)
        )))
    }

    pub(super) fn pin(cpus: &[u64]) {
        let mut mask: Mask = [0; MOST_CPUS as usize / 64];
        for cpu in cpus {
            mask[(cpu / 64) as usize] |= 1 << (cpu % 64);
        }
        // These processors were allowed when the loader was opened. If a container lost some of
        // them since, the remaining ones or any others do as well.
        // SAFETY: the call reads from the mask the given size, which is the mask's size.
        let _ = unsafe { libc::sched_setaffinity(0, size_of::<Mask>(), mask.as_ptr().cast()) };
    }

    pub(super) fn lower(by: u64) {
        // On Linux, process 0 means the calling thread here. It begins with the priority of the
        // thread that started it. A thread may always lower its own priority.
        // SAFETY: the calls take no memory.
        unsafe {
            let now = libc::getpriority(libc::PRIO_PROCESS, 0);
            let _ = libc::setpriority(libc::PRIO_PROCESS, 0, (now + by as i32).min(19));
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    fn placement(cpus: Option<Vec<u64>>, nice: u64) -> Result<Placement> {
        Placement::of(&Config { cpu_affinity: cpus, thread_priority: nice, ..Config::default() })
    }

    #[test]
    fn a_worker_is_where_it_was_sent_and_gives_way() {
        let allowed = linux::allowed().unwrap();
        let last = *allowed.last().unwrap();
        let placement = placement(Some(vec![last]), 7).unwrap();
        // SAFETY: the call takes no memory.
        let nice = || unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        let before = nice();
        let found = std::thread::scope(|scope| {
            let worker = || {
                placement.apply();
                (linux::allowed().unwrap(), nice())
            };
            scope.spawn(worker).join().unwrap()
        });
        assert_eq!(found, (vec![last], (before + 7).min(19)));
        assert_eq!((linux::allowed().unwrap(), nice()), (allowed, before), "of that thread alone");
    }

    #[test]
    fn cpus_that_are_not_there_are_named() {
        let error = placement(Some(vec![0, 8000, 8001]), 0).unwrap_err().to_string();
        assert!(error.contains("8000-8001") && error.contains("it may run on"), "{error}");
    }
}
