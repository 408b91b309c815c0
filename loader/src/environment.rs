//! What the environment says: settings, the launcher's ranks, and how many threads to start. The only module that reads it.
//!
//! An argument wins over a `FOREBAY_*` variable, that over the file that `FOREBAY_CONFIG` names, that over the default; every value keeps a note of
//! where it came from. Whatever is unusable is an error, and all of these are reported together.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::Config;
use crate::error::{Error, Result};
use crate::settings::{self, Kind, Setting};

/// Variables that are no settings.
const OTHER_VARIABLES: [&str; 6] = [
    "FOREBAY_CONFIG",
    "FOREBAY_STRICT_ENV",
    "FOREBAY_LOG",
    "FOREBAY_PROGRESS",
    "FOREBAY_PYTHON_FT",
    "FOREBAY_DEMO_QUICK",
];

/// Variables of others that are looked at, beside those of the launchers.
const FOREIGN_VARIABLES: [&str; 7] = [
    "NO_COLOR",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_CPUS_PER_TASK",
    "SLURM_STEP_ID",
    "SLURM_STEPID",
    "TORCHELASTIC_RUN_ID",
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
pub fn resolve(explicit: &[(String, String)], env: &Environment, scope: Scope) -> Result<Resolved> {
    resolve_on(explicit, env, scope, available_cpus())
}

/// Worker threads where none are asked for.
pub fn default_threads() -> u64 {
    let mut warnings = Vec::new();
    threads(&Environment::current(), available_cpus(), &mut warnings).0
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
        match rank(&[&arguments, &variables, &file], env, &mut warnings, &mut notes) {
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
                let found = Found { text: text.clone(), place: name.clone(), origin: "argument".to_owned() };
                values.insert(setting.name, found);
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
            let nearest = settings::nearest_of(
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
    ["_PORT", "_HOST", "_SERVICE_"].iter().any(|part| variable.contains(part))
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
                faults.push(Error::config(format!("`{place}` must be {}, found `{value}`", setting.accepts)));
            }
        }
    }
    values
}

fn read_file(path: &str) -> Result<toml::Table> {
    let place = Path::new(path);
    let text = std::fs::read_to_string(place)
        .map_err(|error| Error::io("cannot read the file that `FOREBAY_CONFIG` names", error).at(place))?;
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

fn rank(own: &[&Values], env: &Environment, warnings: &mut Vec<String>, notes: &mut Vec<String>) -> Result<Ranks> {
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
        if size > 1 {
            notes.push(format!(
                "assuming pure data parallel over {size} ranks (from {origin}); where tensor-, context- or pipeline-parallel peers \
                 should read the same rows, set `dp_rank` and `dp_world_size`"
            ));
        }
        return Ok(Ranks { rank, size, origin });
    }
    Ok(Ranks { rank: 0, size: 1, origin: "default: no launcher found".to_owned() })
}

fn is_slurm_step(env: &Environment) -> bool {
    env.get("SLURM_STEP_ID").or_else(|| env.get("SLURM_STEPID")).is_some()
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
    Err(Error::config(format!("rank must be below world size: found rank {rank} of {size} (from `{place}`)")))
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
    let local = are_shared.then(|| {
        ["LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"].into_iter().find_map(|name| Some((name, positive(name)?)))
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
