//! What the machine and the launcher say.

/// Worker threads where none are asked for: CPUs less one, 1 to 8.
pub fn default_threads() -> u64 {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    cpus.saturating_sub(1).clamp(1, 8)
}
