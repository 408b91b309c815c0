//! What the environment says: settings, the launcher's ranks, and how many threads to start. The only module that reads it.
//!
//! An argument wins over a `FOREBAY_*` variable, that over the file that `FOREBAY_CONFIG` names, that over the default; every value keeps a note of
//! where it came from. Whatever is unusable is an error, and all of these are reported together.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::settings::Config;
use crate::settings::suggest::nearest_of;
use crate::settings::{self, Kind, Setting};

/// Variables that are no settings.
const OTHER_VARIABLES: [&str; 9] = [
    "FOREBAY_CONFIG",
    "FOREBAY_STRICT_ENV",
    "FOREBAY_LOG",
    "FOREBAY_TRACE",
    "FOREBAY_PROGRESS",
    "FOREBAY_PYTHON_FT",
    "FOREBAY_DEMO_QUICK",
    "FOREBAY_TEST_FILES",
    "FOREBAY_WHEEL_PROFILE",
];

/// Variables of others that are looked at, beside those of the launchers.
const FOREIGN_VARIABLES: [&str; 11] = [
    "NO_COLOR",
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
const LAUNCHERS: [(&str, &str); 4] = [
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS"),
];

/// The variables of a process that have a meaning here; no others are kept, so that printing this gives no secret away.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    vars: BTreeMap<String, String>,
}

impl Environment {
    /// Of this process. Bytes that are not UTF-8 are replaced.
    pub fn current() -> Self {
        #[allow(clippy::disallowed_methods)] // this module is the one that may
        let vars = std::env::vars_os();
        Self::from_pairs(vars.filter_map(|(name, value)| {
            let name = name.into_string().ok()?;
            is_read(&name).then(|| (name, value.to_string_lossy().into_owned()))
        }))
    }

    /// Of `pairs`.
    pub fn from_pairs<N: Into<String>, V: Into<String>>(pairs: impl IntoIterator<Item = (N, V)>) -> Self {
        Self { vars: pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect() }
    }

    /// Value of variable `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.vars.get(name).map(String::as_str)
    }

    /// Whether the boolean variable `name` is on; `default` where it is not set.
    pub fn switch(&self, name: &str, default: bool) -> Result<bool> {
        let Some(text) = self.get(name) else { return Ok(default) };
        settings::boolean(text.trim())
            .ok_or_else(|| Error::config(format!("`{name}` must be `true` or `false`, found `{text}`")))
    }
}

fn is_read(name: &str) -> bool {
    name.starts_with("FOREBAY_")
        || FOREIGN_VARIABLES.contains(&name)
        || LAUNCHERS.iter().any(|(rank, size)| *rank == name || *size == name)
}

/// What may be taken from the environment and the file, besides the rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Operational settings: a variable must not change silently what an explicit call trains on.
    OperationalOnly,
    /// Every setting.
    All,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The setting.
    pub name: &'static str,
    /// Its value, as text.
    pub value: String,
    /// `argument`, a variable, a file, `default`, or how it was computed.
    pub origin: String,
}

/// Settings in force.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The settings, with rank, world size and threads filled in; not validated.
    pub config: Config,
    /// Where each came from, in the order of [`settings::all`].
    pub origins: Vec<Origin>,
    /// What is probably a mistake.
    pub warnings: Vec<String>,
    /// What was assumed.
    pub notes: Vec<String>,
}

/// The settings that `explicit` (names and texts), `env` and the file it names come to. Every fault is listed.
///
/// Of arguments given twice the last one counts, but those for `data` are one list.
pub fn resolve(explicit: &[(String, String)], env: &Environment, scope: Scope) -> Result<Resolved> {
    resolve_on(explicit, env, scope, available_cpus())
}

/// Worker threads where none are asked for.
pub fn default_threads() -> u64 {
    let mut warnings = Vec::new();
    threads(&Environment::current(), available_cpus(), &mut warnings).0
}

/// What the launcher calls this start of the job: an id of torchrun or SLURM, and how often it was started again.
pub fn launch() -> Option<String> {
    launch_in(&Environment::current())
}

/// Where a trace is to be written, if it is.
pub(crate) fn trace() -> Option<String> {
    Environment::current().get("FOREBAY_TRACE").filter(|path| !path.is_empty()).map(str::to_owned)
}

fn launch_in(env: &Environment) -> Option<String> {
    // torchrun's id is `none` where neither it nor the user made one up.
    let torchrun = env.get("TORCHELASTIC_RUN_ID").filter(|id| !matches!(*id, "" | "none"));
    let found = match torchrun {
        Some(id) => Some(("torchrun", id, "TORCHELASTIC_RESTART_COUNT")),
        None => env.get("SLURM_JOB_ID").map(|id| ("slurm", id, "SLURM_RESTART_COUNT")),
    };
    found.map(|(launcher, id, restarts)| format!("{launcher} {id}.{}", env.get(restarts).unwrap_or("0")))
}

/// CPUs that affinity and cgroup limits leave to this process.
fn available_cpus() -> u64 {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64)
}

/// A value, and what to call the place it is from.
#[derive(Clone, Debug)]
struct Found {
    text: String,
    /// In errors.
    place: String,
    /// As the value's origin.
    origin: String,
}

/// Values of one source by setting.
type Values = BTreeMap<&'static str, Found>;

fn resolve_on(explicit: &[(String, String)], env: &Environment, scope: Scope, cpus: u64) -> Result<Resolved> {
    let mut faults = Vec::new();
    let (mut warnings, mut notes) = (Vec::new(), Vec::new());
    let arguments = arguments(explicit, &mut faults);
    let variables = variables(env, &mut faults, &mut warnings);
    let file = match env.get("FOREBAY_CONFIG").filter(|path| !path.is_empty()) {
        Some(path) => file(path, &mut faults),
        None => Values::new(),
    };

    let mut config = Config::default();
    let mut origins: BTreeMap<&str, String> = BTreeMap::new();
    let applies = |setting: &Setting| scope == Scope::All || setting.kind == Kind::Operational || is_rank(setting);
    let mut ignored = Vec::new();
    let mut rank_is_faulty = false;
    // The weakest first; a value that is overruled is still checked.
    for (source, is_explicit) in [(&file, false), (&variables, false), (&arguments, true)] {
        for setting in settings::all() {
            let Some(found) = source.get(setting.name) else { continue };
            if !is_explicit && !applies(setting) {
                ignored.push(format!("`{}`", found.place));
            } else if is_rank(setting) {
                // Ranks go by pairs, below.
                if let Err(fault) = setting.set_from(&mut Config::default(), &found.text, &found.place) {
                    faults.push(fault);
                    rank_is_faulty = true;
                }
            } else {
                match setting.set_from(&mut config, &found.text, &found.place) {
                    Ok(()) => drop(origins.insert(setting.name, found.origin.clone())),
                    Err(fault) => faults.push(fault),
                }
            }
        }
    }
    if !ignored.is_empty() {
        notes.push(format!(
            "not applied: {}; what is trained on comes from arguments here, not from the environment",
            ignored.join(", ")
        ));
    }

    // A faulty number is a fault already, and would only be found again.
    if !rank_is_faulty {
        match rank(&[&arguments, &variables, &file], env, config.model_parallel_size, &mut warnings, &mut notes) {
            Ok(Ranks { rank, size, origin }) => {
                (config.dp_rank, config.dp_world_size) = (Some(rank), Some(size));
                origins.extend([("dp_rank", origin.clone()), ("dp_world_size", origin)]);
            }
            Err(fault) => faults.push(fault),
        }
    }
    if config.num_threads.is_none() {
        let (count, arithmetic) = threads(env, cpus, &mut warnings);
        config.num_threads = Some(count);
        origins.insert("num_threads", arithmetic);
    }
    if !faults.is_empty() {
        return Err(Error::all(faults));
    }
    let origins = settings::all()
        .iter()
        .map(|setting| Origin {
            name: setting.name,
            value: (setting.get)(&config),
            origin: origins.remove(setting.name).unwrap_or_else(|| "default".to_owned()),
        })
        .collect();
    Ok(Resolved { config, origins, warnings, notes })
}

fn is_rank(setting: &Setting) -> bool {
    matches!(setting.name, "dp_rank" | "dp_world_size")
}

fn arguments(explicit: &[(String, String)], faults: &mut Vec<Error>) -> Values {
    let mut values = Values::new();
    for (name, text) in explicit {
        match settings::find(name) {
            Some(setting) => {
                let text = match values.get(setting.name) {
                    Some(Found { text: before, .. }) if setting.name == "data" => format!("{before},{text}"),
                    _ => text.clone(),
                };
                values.insert(setting.name, Found { text, place: name.clone(), origin: "argument".to_owned() });
            }
            None => faults.push(unknown(&format!("setting `{name}` is unknown"), settings::nearest(name))),
        }
    }
    values
}

/// The settings among the variables. Other names that begin as ours do are reported.
fn variables(env: &Environment, faults: &mut Vec<Error>, warnings: &mut Vec<String>) -> Values {
    let strict = env.switch("FOREBAY_STRICT_ENV", false).unwrap_or_else(|fault| {
        faults.push(fault);
        false
    });
    let names: BTreeMap<String, &Setting> =
        settings::all().iter().map(|setting| (setting.variable(), setting)).collect();
    let mut values = Values::new();
    for (variable, text) in &env.vars {
        if let Some(setting) = names.get(variable) {
            let found = Found { text: text.clone(), place: variable.clone(), origin: variable.clone() };
            values.insert(setting.name, found);
        } else if variable.starts_with("FOREBAY_")
            && !OTHER_VARIABLES.contains(&variable.as_str())
            && !is_of_a_service(variable)
        {
            let known = names.keys().map(String::as_str).chain(OTHER_VARIABLES);
            // Without the prefix, which all have in common and which would make all of them near.
            let nearest = nearest_of(
                variable.trim_start_matches("FOREBAY_"),
                known.map(|name| name.trim_start_matches("FOREBAY_")),
            );
            let nearest = nearest.map(|name| format!("FOREBAY_{name}"));
            let fault = unknown(&format!("variable `{variable}` is unknown"), nearest.as_deref());
            if strict { faults.push(fault) } else { warnings.push(fault.to_string()) }
        }
    }
    values
}

/// Kubernetes sets such names for a service called `forebay`.
fn is_of_a_service(variable: &str) -> bool {
    variable.ends_with("_PORT")
        || variable.ends_with("_HOST")
        || variable.contains("_PORT_")
        || variable.contains("_SERVICE_")
}

fn unknown(what: &str, nearest: Option<&str>) -> Error {
    match nearest {
        Some(name) => Error::config(format!("{what}: did you mean `{name}`?")),
        None => Error::config(format!("{what}; `forebay config` lists all")),
    }
}

fn file(path: &str, faults: &mut Vec<Error>) -> Values {
    let table = match read_file(path) {
        Ok(table) => table,
        Err(fault) => {
            faults.push(fault);
            return Values::new();
        }
    };
    let mut values = Values::new();
    for (key, value) in &table {
        let Some(setting) = settings::find(key) else {
            faults.push(unknown(&format!("key `{key}` of `{path}` is unknown"), settings::nearest(key)));
            continue;
        };
        let place = format!("{path}: {key}");
        match text_of(value, setting) {
            Some(text) => drop(values.insert(setting.name, Found { text, place, origin: path.to_owned() })),
            None => {
                faults.push(Error::config(format!(
                    "`{place}` must be {}, found a value of type {}",
                    setting.accepts,
                    value.type_str()
                )));
            }
        }
    }
    values
}

fn read_file(path: &str) -> Result<toml::Table> {
    let place = Path::new(path);
    let text = std::fs::read_to_string(place).map_err(|error| {
        Error::config("cannot read the file that `FOREBAY_CONFIG` names").with_source(error).at(place)
    })?;
    text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(0, |span| text[..span.start].matches('\n').count() + 1);
        Error::config(format!(
            "the file that `FOREBAY_CONFIG` names is not valid TOML in line {line}: {}",
            error.message()
        ))
        .at(place)
    })
}

fn text_of(value: &toml::Value, setting: &Setting) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Boolean(on) => Some(on.to_string()),
        toml::Value::Table(_) if setting.name == "mixture" => serde_json::to_string(value).ok(),
        toml::Value::Array(items) if setting.name == "data" => {
            let names: Option<Vec<&str>> = items.iter().map(toml::Value::as_str).collect();
            Some(settings::list_text(&names?))
        }
        _ => None,
    }
}

/// Rank and world size, from one source.
#[derive(Debug, PartialEq, Eq)]
struct Ranks {
    rank: u64,
    size: u64,
    origin: String,
}

fn rank(
    own: &[&Values],
    env: &Environment,
    model_parallel_size: u64,
    warnings: &mut Vec<String>,
    notes: &mut Vec<String>,
) -> Result<Ranks> {
    for source in own {
        if let Some(ranks) = own_ranks(source)? {
            return Ok(ranks);
        }
    }
    for (rank_name, size_name) in LAUNCHERS {
        let (rank, size) = match (env.get(rank_name), env.get(size_name)) {
            (None, None) => continue,
            // An allocation has these names without having started a task.
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
            settings::integer(text.trim()).ok_or_else(|| {
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
            return Ok(Ranks {
                rank,
                size,
                origin: format!("{origin}, {model_parallel_size} at a time reading the same rows"),
            });
        }
        if size > 1 {
            notes.push(format!(
                "assuming pure data parallel over {size} ranks (from {origin}); where tensor-, context- or pipeline-parallel peers \
                 should read the same rows, set `model_parallel_size`, or `dp_rank` and `dp_world_size`"
            ));
        }
        return Ok(Ranks { rank, size, origin });
    }
    Ok(Ranks { rank: 0, size: 1, origin: "default: no launcher found".to_owned() })
}

/// Whether srun started this process as a task. The shell of an allocation and a batch script are steps as well, with ids above all of
/// srun's, and see the number of tasks that they may start: taken for one of these, they would train on a share of the data.
fn is_slurm_step(env: &Environment) -> bool {
    const LAST_OF_SRUN: u64 = 0xffff_fff0;
    let id = env.get("SLURM_STEP_ID").or_else(|| env.get("SLURM_STEPID"));
    id.is_some_and(|id| settings::integer(id.trim()).is_none_or(|id| id <= LAST_OF_SRUN))
}

/// The ranks that `source` sets, whose values were checked one by one.
fn own_ranks(source: &Values) -> Result<Option<Ranks>> {
    let mut config = Config::default();
    let found = [source.get("dp_rank"), source.get("dp_world_size")];
    for (name, found) in ["dp_rank", "dp_world_size"].iter().zip(found) {
        if let (Some(setting), Some(found)) = (settings::find(name), found) {
            setting.set_from(&mut config, &found.text, &found.place)?;
        }
    }
    let origin = found.into_iter().flatten().map(|found| found.origin.clone()).collect::<Vec<_>>();
    let place = found.into_iter().flatten().map(|found| found.place.clone()).collect::<Vec<_>>().join("` and `");
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

/// Worker threads for one of the ranks on `cpus`, and the arithmetic. `OMP_NUM_THREADS` and `RAYON_NUM_THREADS` are about other pools, and
/// torchrun sets the first to 1.
fn threads(env: &Environment, cpus: u64, warnings: &mut Vec<String>) -> (u64, String) {
    let mut positive = |name: &str| {
        let text = env.get(name)?;
        let number = settings::integer(text.trim()).filter(|number| *number > 0);
        if number.is_none() {
            warnings.push(format!("`{name}` is ignored: expected an integer from 1, found `{text}`"));
        }
        number
    };
    let per_task = positive("SLURM_CPUS_PER_TASK");
    // srun gives each task CPUs of its own, so its ranks do not share them; ranks that torchrun starts inside of a task do.
    let are_shared = per_task.is_none() || env.get("TORCHELASTIC_RUN_ID").is_some();
    // Outside of a step it says how many tasks could be started, not how many there are.
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
    let count = share.saturating_sub(1).clamp(1, 8);
    (count, format!("default: {text} - 1, within 1 to 8"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::settings::Shuffle;

    fn env(pairs: &[(&str, &str)]) -> Environment {
        Environment::from_pairs(pairs.iter().copied())
    }

    fn explicit(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    fn all(arguments: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Resolved> {
        resolve_on(&explicit(arguments), &env(variables), Scope::All, 16)
    }

    fn origin<'a>(resolved: &'a Resolved, name: &str) -> &'a str {
        &resolved.origins.iter().find(|origin| origin.name == name).unwrap().origin
    }

    /// A file with `text`, deleted when dropped.
    fn file(text: &str) -> (tempfile::NamedTempFile, String) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let path = file.path().to_str().unwrap().to_owned();
        (file, path)
    }

    #[test]
    fn arguments_win_over_variables_over_file_over_default() {
        let (_file, path) = file("seq_len = 1\nbatch_size = 2\nseed = 3\n");
        let variables =
            [("FOREBAY_CONFIG", path.as_str()), ("FOREBAY_BATCH_SIZE", "20"), ("FOREBAY_SEED", "30"), ("HOME", "/")];
        let resolved = all(&[("seed", "300")], &variables).unwrap();
        let config = &resolved.config;
        assert_eq!((config.seq_len, config.batch_size, config.seed, config.lanes), (1, 20, 300, 8));
        assert_eq!(origin(&resolved, "seq_len"), path);
        assert_eq!(origin(&resolved, "batch_size"), "FOREBAY_BATCH_SIZE");
        assert_eq!(origin(&resolved, "seed"), "argument");
        assert_eq!(origin(&resolved, "lanes"), "default");
        assert_eq!(resolved.origins.len(), settings::all().len());
        assert_eq!(resolved.origins.iter().find(|origin| origin.name == "seed").unwrap().value, "300");
        assert!(resolved.warnings.is_empty() && resolved.notes.is_empty(), "{resolved:?}");
    }

    #[test]
    fn files_have_native_types() {
        let (_file, path) = file(
            "data = ['a,b', \"c\"]\nshuffle = true\npin_memory = true\nmemory_budget = '1GiB'\nformat = 'arrow'\neos_id = 7\n",
        );
        let config = all(&[], &[("FOREBAY_CONFIG", &path)]).unwrap().config;
        assert_eq!(config.data, ["a,b", "c"]);
        assert_eq!((config.shuffle, config.memory_budget, config.eos_id), (Shuffle::On, 1 << 30, Some(7)));
        assert!(config.pin_memory);
    }

    #[test]
    fn faults_of_files_name_key_and_file() {
        let (_file, path) = file("seqlen = 1\nbatch_size = -1\nlanes = [1]\nseed = 1.5\n");
        let report = all(&[], &[("FOREBAY_CONFIG", &path)]).unwrap_err().report();
        for words in [
            format!("key `seqlen` of `{path}` is unknown: did you mean `seq_len`?"),
            format!("`{path}: batch_size` must be an integer from 1 to 2^32, found `-1`"),
            format!("`{path}: lanes` must be an integer from 1 to 2^20, found a value of type array"),
            format!("`{path}: seed` must be"),
        ] {
            assert!(report.contains(&words), "{report}");
        }
        let (_file, path) = file("seq_len = 1\nseed = \n");
        let report = all(&[], &[("FOREBAY_CONFIG", &path)]).unwrap_err().report();
        assert!(report.contains("not valid TOML in line 2") && report.contains(&path), "{report}");
        let missing = all(&[], &[("FOREBAY_CONFIG", "/nowhere/forebay.toml")]).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::Config);
        assert!(missing.report().contains("/nowhere/forebay.toml"), "{}", missing.report());
    }

    #[test]
    fn every_fault_is_listed_with_its_place() {
        let variables = [("FOREBAY_SEQ_LEN", "many"), ("FOREBAY_PIN_MEMORY", "perhaps"), ("FOREBAY_STRICT_ENV", "?")];
        let report = all(&[("io", "tape"), ("colour", "red")], &variables).unwrap_err().report();
        for words in [
            "5 faults",
            "`FOREBAY_SEQ_LEN` must be a number of tokens from 1 to 2^32, found `many`",
            "`FOREBAY_PIN_MEMORY` must be `true` or `false`, found `perhaps`",
            "`FOREBAY_STRICT_ENV` must be `true` or `false`, found `?`",
            "`io` must be `auto`, `mmap` or `pread`, found `tape`",
            "setting `colour` is unknown; `forebay config` lists all",
        ] {
            assert!(report.contains(words), "{report}");
        }
    }

    #[test]
    fn unknown_variables_are_reported() {
        let variables = [
            ("FOREBAY_SEQLEN", "1"),
            ("FOREBAY_SERVICE_HOST", "10.0.0.1"),
            ("FOREBAY_PORT_80_TCP_ADDR", "10.0.0.1"),
            ("FOREBAY_PORT", "tcp://10.0.0.1:80"),
            ("FOREBAY_LOG", "debug"),
            ("FOREBAY_PROGRESS", "0"),
            ("FOREBAY_PYTHON_FT", "python3.14t"),
            ("FOREBAY_DEMO_QUICK", "1"),
        ];
        let resolved = all(&[], &variables).unwrap();
        assert_eq!(
            resolved.warnings,
            ["variable `FOREBAY_SEQLEN` is unknown: did you mean `FOREBAY_SEQ_LEN`?"],
            "of all these, one"
        );
        let warnings = all(&[], &[("FOREBAY_PORTION", "1"), ("FOREBAY_HOSTS", "1")]).unwrap().warnings;
        assert_eq!(warnings.len(), 2, "names that no service has: {warnings:?}");
        let strict: Vec<_> = variables.into_iter().chain([("FOREBAY_STRICT_ENV", "1")]).collect();
        let error = all(&[], &strict).unwrap_err();
        assert_eq!(error.to_string(), resolved.warnings[0]);
    }

    #[test]
    fn content_comes_from_arguments_alone_where_asked() {
        let (_file, path) = file("seed = 3\nnum_threads = 5\n");
        let variables = env(&[
            ("FOREBAY_CONFIG", &path),
            ("FOREBAY_SEQ_LEN", "nonsense"),
            ("FOREBAY_BATCH_SIZE", "4"),
            ("FOREBAY_PREFETCH_BATCHES", "9"),
            ("FOREBAY_DP_RANK", "1"),
            ("FOREBAY_DP_WORLD_SIZE", "2"),
        ]);
        let arguments = explicit(&[("lanes", "4")]);
        let resolved = resolve_on(&arguments, &variables, Scope::OperationalOnly, 16).unwrap();
        let config = &resolved.config;
        assert_eq!((config.seq_len, config.batch_size, config.seed, config.lanes), (2048, 1, 0, 4));
        assert_eq!((config.prefetch_batches, config.num_threads), (9, Some(5)));
        assert_eq!((config.dp_rank, config.dp_world_size), (Some(1), Some(2)));
        assert_eq!(origin(&resolved, "seq_len"), "default");
        assert_eq!(resolved.notes.len(), 1);
        for name in ["`FOREBAY_SEQ_LEN`", "`FOREBAY_BATCH_SIZE`", "seed`"] {
            assert!(resolved.notes[0].contains(name), "{:?}", resolved.notes);
        }
    }

    #[test]
    fn ranks_come_from_the_first_that_names_both() {
        // From the weakest to the strongest; each wins over all before it.
        let (_file, path) = file("dp_rank = 4\ndp_world_size = 40\n");
        type Family<'a> = (&'a [(&'a str, &'a str)], u64, &'a str);
        let families: [Family<'_>; 6] = [
            (
                &[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "10"), ("SLURM_STEP_ID", "0")],
                10,
                "SLURM_PROCID and SLURM_NTASKS",
            ),
            (&[("PMI_RANK", "1"), ("PMI_SIZE", "11")], 11, "PMI_RANK and PMI_SIZE"),
            (
                &[("OMPI_COMM_WORLD_RANK", "2"), ("OMPI_COMM_WORLD_SIZE", "12")],
                12,
                "OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE",
            ),
            (&[("RANK", "3"), ("WORLD_SIZE", "13")], 13, "RANK and WORLD_SIZE"),
            (&[("FOREBAY_CONFIG", &path)], 40, &path),
            (
                &[("FOREBAY_DP_RANK", "5"), ("FOREBAY_DP_WORLD_SIZE", "15")],
                15,
                "FOREBAY_DP_RANK and FOREBAY_DP_WORLD_SIZE",
            ),
        ];
        let mut variables: Vec<(&str, &str)> = Vec::new();
        let resolved = all(&[], &variables).unwrap();
        assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(0), Some(1)));
        assert_eq!(origin(&resolved, "dp_rank"), "default: no launcher found");
        for (index, (pairs, size, place)) in families.into_iter().enumerate() {
            variables.extend(pairs);
            let resolved = all(&[], &variables).unwrap();
            assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(index as u64), Some(size)));
            assert_eq!(origin(&resolved, "dp_rank"), place);
            assert_eq!(origin(&resolved, "dp_world_size"), place);
            assert_eq!(resolved.notes.len(), usize::from(index < 4), "only what was found is an assumption");
            if index < 4 {
                let words = format!("assuming pure data parallel over {size} ranks (from {place})");
                assert!(resolved.notes[0].contains(&words), "{:?}", resolved.notes);
            }
        }
        let resolved = all(&[("dp_rank", "6"), ("dp_world_size", "16")], &variables).unwrap();
        assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(6), Some(16)));
        assert_eq!(origin(&resolved, "dp_rank"), "argument");
    }

    #[test]
    fn replicated_ranks_read_the_same_rows() {
        for rank in 0..8 {
            let rank_text = rank.to_string();
            let variables = [("RANK", rank_text.as_str()), ("WORLD_SIZE", "8"), ("FOREBAY_MODEL_PARALLEL_SIZE", "4")];
            let config = all(&[], &variables).unwrap().config;
            assert_eq!((config.dp_rank, config.dp_world_size), (Some(rank / 4), Some(2)));
        }
        let error =
            all(&[("model_parallel_size", "3")], &[("RANK", "0"), ("WORLD_SIZE", "8")]).unwrap_err().to_string();
        assert!(error.contains("must divide the launcher's 8 ranks"), "{error}");
        let own = all(&[("dp_rank", "1"), ("dp_world_size", "2"), ("model_parallel_size", "4")], &[]).unwrap().config;
        assert_eq!((own.dp_rank, own.dp_world_size), (Some(1), Some(2)), "data-parallel ranks are data-parallel ranks");
    }

    #[test]
    fn arguments_given_twice() {
        let arguments = [("data", r"a\,b"), ("seed", "1"), ("data", "c,d"), ("seed", "2")];
        let config = all(&arguments, &[("FOREBAY_DATA", "e")]).unwrap().config;
        assert_eq!((config.seed, config.data), (2, ["a,b", "c", "d"].map(str::to_owned).to_vec()));
    }

    #[test]
    fn half_a_pair_is_an_error_or_left_out() {
        for (arguments, variables) in [
            (&[("dp_rank", "0")][..], &[("FOREBAY_DP_WORLD_SIZE", "2")][..]),
            (&[], &[("FOREBAY_DP_WORLD_SIZE", "2"), ("RANK", "0"), ("WORLD_SIZE", "2")]),
            (&[("dp_world_size", "2")], &[]),
        ] {
            let error = all(arguments, variables).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("belong together"), "{error}");
        }
        let variables = [("WORLD_SIZE", "8"), ("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        let resolved = all(&[], &variables).unwrap();
        assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(1), Some(2)));
        assert_eq!(resolved.warnings, ["`WORLD_SIZE` is ignored: it is set without `RANK`"]);
    }

    #[test]
    fn impossible_ranks_are_errors() {
        for (variables, words) in [
            (&[("RANK", "2"), ("WORLD_SIZE", "2")], "rank 2 of 2 (from `RANK` and `WORLD_SIZE`)"),
            (&[("RANK", "x"), ("WORLD_SIZE", "2")], "`RANK` must be an integer, found `x`"),
            (&[("FOREBAY_DP_RANK", "3"), ("FOREBAY_DP_WORLD_SIZE", "3")], "rank 3 of 3 (from `FOREBAY_DP_RANK"),
            (
                &[("FOREBAY_DP_RANK", "0"), ("FOREBAY_DP_WORLD_SIZE", "0")],
                "`FOREBAY_DP_WORLD_SIZE` must be an integer from 1",
            ),
        ] {
            let error = all(&[], variables).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    #[test]
    fn slurm_counts_only_inside_of_a_step() {
        let size = |variables: &[(&str, &str)]| {
            let resolved = all(&[], variables).unwrap();
            assert!(resolved.warnings.is_empty(), "{:?}", resolved.warnings);
            resolved.config.dp_world_size
        };
        assert_eq!(size(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8")]), Some(1), "an allocation");
        assert_eq!(size(&[("SLURM_NTASKS", "8")]), Some(1), "an allocation");
        assert_eq!(size(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "1"), ("SLURM_STEP_ID", "0")]), Some(1));
        assert_eq!(size(&[("SLURM_PROCID", "7"), ("SLURM_NTASKS", "8"), ("SLURM_STEP_ID", "0")]), Some(8));
        assert_eq!(size(&[("SLURM_PROCID", "7"), ("SLURM_NTASKS", "8"), ("SLURM_STEPID", "0")]), Some(8));
        for id in ["4294967290", "4294967291", "4294967292"] {
            let step = ("SLURM_STEP_ID", id);
            assert_eq!(
                size(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "8"), step]),
                Some(1),
                "a shell or a script: {id}"
            );
        }
    }

    #[test]
    fn threads_share_the_cpus_of_the_machine() {
        for (cpus, variables, count, text) in [
            (1, &[][..], 1, "default: 1 CPUs - 1, within 1 to 8"),
            (6, &[], 5, "default: 6 CPUs - 1, within 1 to 8"),
            (64, &[], 8, "default: 64 CPUs - 1, within 1 to 8"),
            (16, &[("OMP_NUM_THREADS", "1"), ("RAYON_NUM_THREADS", "2")], 8, "default: 16 CPUs - 1, within 1 to 8"),
            (16, &[("LOCAL_WORLD_SIZE", "4")], 3, "default: 16 CPUs / LOCAL_WORLD_SIZE 4 - 1, within 1 to 8"),
            (
                16,
                &[("OMPI_COMM_WORLD_LOCAL_SIZE", "8")],
                1,
                "default: 16 CPUs / OMPI_COMM_WORLD_LOCAL_SIZE 8 - 1, within 1 to 8",
            ),
            (4, &[("LOCAL_WORLD_SIZE", "8")], 1, "default: 4 CPUs / LOCAL_WORLD_SIZE 8 - 1, within 1 to 8"),
            (
                32,
                &[("SLURM_NTASKS_PER_NODE", "8"), ("SLURM_STEP_ID", "0")],
                3,
                "default: 32 CPUs / SLURM_NTASKS_PER_NODE 8 - 1, within 1 to 8",
            ),
            (8, &[("SLURM_NTASKS_PER_NODE", "8")], 7, "default: 8 CPUs - 1, within 1 to 8"),
            (
                32,
                &[("SLURM_CPUS_PER_TASK", "6"), ("LOCAL_WORLD_SIZE", "4")],
                5,
                "default: min(32 CPUs, SLURM_CPUS_PER_TASK 6) - 1, within 1 to 8",
            ),
            (
                32,
                &[("SLURM_CPUS_PER_TASK", "32"), ("LOCAL_WORLD_SIZE", "8"), ("TORCHELASTIC_RUN_ID", "1")],
                3,
                "default: min(32 CPUs, SLURM_CPUS_PER_TASK 32) / LOCAL_WORLD_SIZE 8 - 1, within 1 to 8",
            ),
        ] {
            let resolved = resolve_on(&[], &env(variables), Scope::OperationalOnly, cpus).unwrap();
            assert_eq!(resolved.config.num_threads, Some(count), "{text}");
            assert_eq!(origin(&resolved, "num_threads"), text);
        }
        let variables = [("LOCAL_WORLD_SIZE", "0"), ("SLURM_CPUS_PER_TASK", "x")];
        let resolved = all(&[], &variables).unwrap();
        assert_eq!(resolved.config.num_threads, Some(8));
        assert_eq!(resolved.warnings.len(), 2, "{:?}", resolved.warnings);
        let resolved = all(&[("num_threads", "3")], &variables).unwrap();
        assert_eq!((resolved.config.num_threads, origin(&resolved, "num_threads")), (Some(3), "argument"));
        assert!((1..=8).contains(&default_threads()));
    }

    #[test]
    fn a_start_of_a_job_has_the_launchers_name() {
        for (variables, name) in [
            (&[][..], None),
            (&[("TORCHELASTIC_RUN_ID", "none")], None),
            (&[("TORCHELASTIC_RUN_ID", "ab"), ("TORCHELASTIC_RESTART_COUNT", "2")], Some("torchrun ab.2")),
            (&[("TORCHELASTIC_RUN_ID", "none"), ("SLURM_JOB_ID", "77")], Some("slurm 77.0")),
            (&[("SLURM_JOB_ID", "77"), ("SLURM_RESTART_COUNT", "1")], Some("slurm 77.1")),
        ] {
            assert_eq!(launch_in(&env(variables)).as_deref(), name);
        }
    }

    #[test]
    fn what_means_nothing_here_is_not_kept() {
        let current = Environment::current();
        assert!(current.vars.keys().all(|name| is_read(name)), "{:?}", current.vars.keys());
        assert_eq!(current.get("PATH"), None);
        assert!(is_read("FOREBAY_SEED") && is_read("SLURM_NTASKS") && is_read("NO_COLOR"));
    }
}
