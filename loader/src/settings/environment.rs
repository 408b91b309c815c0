//! The environment of the process, limited to the variables that have a meaning here.
//!
//! No other module reads the environment.

use std::collections::BTreeMap;

use super::values::{boolean, size};
use crate::error::{Error, Result};

/// Variables of forebay that are not settings.
pub(super) const OTHER_VARIABLES: [&str; 12] = [
    "FOREBAY_CONFIG",
    "FOREBAY_STRICT_ENV",
    "FOREBAY_LOG",
    "FOREBAY_METRICS",
    "FOREBAY_SERVICE_TOKEN",
    "FOREBAY_TRACE",
    "FOREBAY_TRACE_LIMIT",
    "FOREBAY_PROGRESS",
    "FOREBAY_PYTHON_FT",
    "FOREBAY_DEMO_QUICK",
    "FOREBAY_TEST_FILES",
    "FOREBAY_WHEEL_PROFILE",
];

/// Variables of other programs that are read, besides the ranks of the launchers.
const FOREIGN_VARIABLES: [&str; 14] = [
    "NO_COLOR",
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "SLURM_LOCALID",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_NTASKS_PER_NODE",
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_RESTART_COUNT",
];

/// Rank and world size as launchers name them, in order of preference.
pub(super) const LAUNCHERS: [(&str, &str); 4] = [
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
];

/// The variables of a process that have a meaning here.
///
/// Other variables are not kept, so that printing this value reveals no secret.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    vars: BTreeMap<String, String>,
}

impl Environment {
    /// Reads the environment of this process. Bytes that are not UTF-8 are replaced.
    pub fn current() -> Self {
        #[allow(clippy::disallowed_methods)] // only this function may
        let vars = std::env::vars_os();
        Self::from_pairs(vars.filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            is_read(&name).then(|| (name, value.to_string_lossy().into_owned()))
        }))
    }

    /// Makes an environment of these names and values.
    pub fn from_pairs<N: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (N, V)>) -> Self {
        Self { vars: pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect() }
    }

    /// Value of variable `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str)
    }

    /// Names and values, in the order of the names.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.vars.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Whether the boolean variable `name` is on. Returns `default` if it is not set.
    pub fn switch(&self, name: &str, default: bool) -> Result<bool> {
        let Some(text) = self.get(name) else { return Ok(default) };
        boolean(text.trim()).ok_or_else(|| Error::config(format!("`{name}` must be `true` or `false`, found `{text}`")))
    }

    /// The number of this rank on its machine. 0 without a launcher.
    pub fn local_rank(&self) -> u16 {
        let names = ["LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID"];
        names.iter().find_map(|name| self.get(name)?.trim().parse().ok()).unwrap_or(0)
    }

    /// The launcher's name of this start of the job: an id of torchrun or SLURM, and the number of
    /// earlier restarts.
    pub(super) fn launch(&self) -> Option<String> {
        // The id of torchrun is `none` if neither torchrun nor the user chose one.
        let torchrun = self.get("TORCHELASTIC_RUN_ID").filter(|id| !matches!(*id, "" | "none"));
        let found = match torchrun {
            Some(id) => Some(("torchrun", id, "TORCHELASTIC_RESTART_COUNT")),
            None => self.get("SLURM_JOB_ID").map(|id| ("slurm", id, "SLURM_RESTART_COUNT")),
        };
        found.map(|(launcher, id, restarts)| format!("{launcher} {id}.{}", self.get(restarts).unwrap_or("0")))
    }
}

/// The launcher's name of this start of the job, in the environment of this process.
pub fn launch() -> Option<String> {
    Environment::current().launch()
}

/// Largest size of a trace in bytes, unless `FOREBAY_TRACE_LIMIT` gives another limit.
const TRACE_LIMIT: u64 = 64 << 20;

/// Path of the trace and its limit in bytes, if the environment asks for a trace.
pub(crate) fn trace() -> Result<Option<(String, u64)>> {
    trace_in(&Environment::current())
}

fn trace_in(env: &Environment) -> Result<Option<(String, u64)>> {
    let Some(path) = env.get("FOREBAY_TRACE").filter(|path| !path.is_empty()) else { return Ok(None) };
    let limit = match env.get("FOREBAY_TRACE_LIMIT").filter(|text| !text.is_empty()) {
        None => TRACE_LIMIT,
        Some(text) => size(text.trim(), true).filter(|limit| *limit > 0).ok_or_else(|| {
            Error::config(format!("`FOREBAY_TRACE_LIMIT` must be bytes, such as `64MiB`, found `{text}`"))
        })?,
    };
    Ok(Some((path.to_owned(), limit)))
}

fn is_read(name: &str) -> bool {
    name.starts_with("FOREBAY_")
        || FOREIGN_VARIABLES.contains(&name)
        || LAUNCHERS.iter().any(|(rank, size)| *rank == name || *size == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_of_a_job_has_the_launchers_name() {
        for (variables, name) in [
            (&[][..], None),
            (&[("TORCHELASTIC_RUN_ID", "none")], None),
            (&[("TORCHELASTIC_RUN_ID", "ab"), ("TORCHELASTIC_RESTART_COUNT", "2")], Some("torchrun ab.2")),
            (&[("TORCHELASTIC_RUN_ID", "none"), ("SLURM_JOB_ID", "77")], Some("slurm 77.0")),
            (&[("SLURM_JOB_ID", "77"), ("SLURM_RESTART_COUNT", "1")], Some("slurm 77.1")),
        ] {
            assert_eq!(Environment::from_pairs(variables.iter().copied()).launch().as_deref(), name);
        }
    }

    #[test]
    fn variables_without_a_meaning_here_are_not_kept() {
        let current = Environment::current();
        assert!(current.vars.keys().all(|name| is_read(name)), "{:?}", current.vars.keys());
        assert_eq!(current.get("PATH"), None);
        assert!(is_read("FOREBAY_SEED") && is_read("SLURM_NTASKS") && is_read("NO_COLOR"));
    }
}
