//! Finds the data-parallel rank of this process, and the number of its threads.

use super::environment::{Environment, LAUNCHERS};
use super::framework::ProcessGroup;
use super::sources::GivenValues;
use super::values::integer;
use super::{Config, find as find_setting};
use crate::error::{Error, Result};

/// Rank and world size, from one source.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ranks {
    pub(super) rank: u64,
    pub(super) size: u64,
    pub(super) origin: String,
}

/// Finds the data-parallel rank.
///
/// Takes it from the first of the sources `own` that names it, then from the variables of a
/// launcher, and then from the process group.
pub(super) fn find(
    own: &[&GivenValues],
    env: &Environment,
    group: Option<&ProcessGroup>,
    model_parallel_size: u64,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<Ranks> {
    for source in own {
        if let Some(ranks) = own_ranks(source)? {
            return Ok(ranks);
        }
    }
    let launched = launched(env, model_parallel_size, warnings, notes)?;
    let Some(ProcessGroup { name, rank, size }) = group else {
        let alone = || Ranks { rank: 0, size: 1, origin: "default: no launcher found".to_owned() };
        return Ok(launched.unwrap_or_else(alone));
    };
    if size % model_parallel_size != 0 {
        return Err(Error::config(format!(
            "`model_parallel_size` must divide the {size} ranks of {name}, found {model_parallel_size}"
        )));
    }
    let (rank, size) = (rank / model_parallel_size, size / model_parallel_size);
    if let Some(found) = launched {
        if (found.rank, found.size) == (rank, size) {
            return Ok(found);
        }
        return Err(Error::config(format!(
            "rank {} of {} was found in {}, but {name} says rank {rank} of {size}: give `dp_rank` and `dp_world_size`",
            found.rank, found.size, found.origin
        )));
    }
    if size > 1 && model_parallel_size == 1 {
        notes.push(format!(
            "assuming pure data parallel over {size} ranks (from {name}); where tensor-, context- or pipeline-parallel \
             peers should read the same rows, set `mesh`, `model_parallel_size`, or `dp_rank` and `dp_world_size`"
        ));
    }
    Ok(Ranks { rank, size, origin: (*name).to_owned() })
}

/// The data-parallel rank in the variables of the first launcher that has left some.
fn launched(
    env: &Environment,
    model_parallel_size: u64,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<Option<Ranks>> {
    for (rank_name, size_name) in LAUNCHERS {
        let (rank, size) = match (env.get(rank_name), env.get(size_name)) {
            (None, None) => continue,
            // An allocation sets these names even if no task was started.
            _ if rank_name == "SLURM_PROCID" && !is_slurm_step(env) => continue,
            (Some(rank), Some(size)) => (rank, size),
            (rank, _) => {
                let (there, missing) = if rank.is_some() { (rank_name, size_name) } else { (size_name, rank_name) };
                warnings.push(format!("`{there}` is ignored: it is set without `{missing}`"));
                continue;
            }
        };
        let origin = format!("{rank_name} and {size_name}");
        let number = |name: &str, text: &str| {
            integer(text.trim()).ok_or_else(|| {
                Error::config(format!(
                    "`{name}` must be an integer, found `{text}`; set `FOREBAY_DP_RANK` and `FOREBAY_DP_WORLD_SIZE` where it means something else"
                ))
            })
        };
        let (rank, size) = (number(rank_name, rank)?, number(size_name, size)?);
        if rank_name == "SLURM_PROCID" && size <= 1 {
            continue;
        }
        check_rank(rank, size, &origin)?;
        if model_parallel_size > 1 {
            if size % model_parallel_size != 0 {
                return Err(Error::config(format!(
                    "`model_parallel_size` must divide the launcher's {size} ranks (from {origin}), found {model_parallel_size}"
                )));
            }
            let (rank, size) = (rank / model_parallel_size, size / model_parallel_size);
            let origin = format!("{origin}, {model_parallel_size} at a time reading the same rows");
            return Ok(Some(Ranks { rank, size, origin }));
        }
        if size > 1 {
            notes.push(format!(
                "assuming pure data parallel over {size} ranks (from {origin}); where tensor-, context- or pipeline-parallel peers \
                 should read the same rows, set `model_parallel_size`, or `dp_rank` and `dp_world_size`"
            ));
        }
        return Ok(Some(Ranks { rank, size, origin }));
    }
    Ok(None)
}

/// Whether srun started this process as a task.
///
/// The shell of an allocation and a batch script are steps as well. Their ids are above all ids of
/// srun's steps, and they see the number of tasks that they may start. If they counted as tasks,
/// they would train on a share of the data.
fn is_slurm_step(env: &Environment) -> bool {
    const LAST_OF_SRUN: u64 = 0xffff_fff0;
    let id = env.get("SLURM_STEP_ID").or_else(|| env.get("SLURM_STEPID"));
    id.is_some_and(|id| integer(id.trim()).is_none_or(|id| id <= LAST_OF_SRUN))
}

/// The ranks that `source` sets. Each of its values was checked before.
fn own_ranks(source: &GivenValues) -> Result<Option<Ranks>> {
    let mut config = Config::default();
    let given = [source.get("dp_rank"), source.get("dp_world_size")];
    for (name, given) in ["dp_rank", "dp_world_size"].iter().zip(given) {
        if let (Some(setting), Some(given)) = (find_setting(name), given) {
            setting.set_from(&mut config, &given.value, &given.place)?;
        }
    }
    let origin = given.into_iter().flatten().map(|given| given.origin.clone()).collect::<Vec<_>>();
    let place = given.into_iter().flatten().map(|given| given.place.clone()).collect::<Vec<_>>().join("` and `");
    match (config.dp_rank, config.dp_world_size) {
        (None, None) => Ok(None),
        (Some(rank), Some(size)) => {
            check_rank(rank, size, &place)?;
            let origin = if origin[0] == origin[1] { origin[0].clone() } else { origin.join(" and ") };
            Ok(Some(Ranks { rank, size, origin }))
        }
        (rank, _) => {
            let missing = if rank.is_some() { "dp_world_size" } else { "dp_rank" };
            Err(Error::config(format!(
                "`dp_rank` and `dp_world_size` belong together and must come from one place: `{place}` is set, and `{missing}` is not set there"
            )))
        }
    }
}

fn check_rank(rank: u64, size: u64, place: &str) -> Result<()> {
    if rank < size {
        return Ok(());
    }
    let place = format!("`{}`", place.replace(" and ", "` and `"));
    Err(Error::config(format!("rank must be below world size: found rank {rank} of {size} (from {place})")))
}

/// Most worker threads that the default takes.
pub const MOST_DEFAULT_THREADS: u64 = 8;

/// Number of CPUs that affinity and cgroup limits leave to this process.
pub fn available_cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

/// Default number of worker threads.
pub fn default_threads() -> u64 {
    threads(&Environment::current(), available_cpus(), &mut Vec::new()).0
}

/// Computes the number of worker threads for one of the ranks on `cpus`. The text shows the
/// arithmetic.
///
/// `OMP_NUM_THREADS` and `RAYON_NUM_THREADS` are not used. They are about other pools, and torchrun
/// sets the first one to 1.
pub(super) fn threads(env: &Environment, cpus: u64, warnings: &mut Vec<String>) -> (u64, String) {
    let mut positive = |name: &str| {
        let text = env.get(name)?;
        let number = integer(text.trim()).filter(|number| *number > 0);
        if number.is_none() {
            warnings.push(format!("`{name}` is ignored: expected an integer from 1, found `{text}`"));
        }
        number
    };
    let per_task = positive("SLURM_CPUS_PER_TASK");
    // srun gives each task its own CPUs, so that its ranks do not share them. Ranks that torchrun
    // starts inside a task share them.
    let are_shared = per_task.is_none() || env.get("TORCHELASTIC_RUN_ID").is_some();
    // Outside of a step, the variable counts the tasks that could be started, not the running ones.
    let of_slurm = is_slurm_step(env).then_some("SLURM_NTASKS_PER_NODE");
    let local = are_shared.then(|| {
        let mut names = ["LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"].into_iter().chain(of_slurm);
        names.find_map(|name| Some((name, positive(name)?)))
    });

    let mut text = format!("{cpus} CPUs");
    let mut share = cpus;
    if let Some(per_task) = per_task {
        share = share.min(per_task);
        text = format!("min({text}, SLURM_CPUS_PER_TASK {per_task})");
    }
    if let Some((name, ranks)) = local.flatten() {
        share /= ranks;
        text = format!("{text} / {name} {ranks}");
    }
    let count = share.saturating_sub(1).clamp(1, MOST_DEFAULT_THREADS);
    (count, format!("default: {text} - 1, within 1 to {MOST_DEFAULT_THREADS}"))
}
