//! Resolves the settings: decides the value of each setting, and notes its origin.
//!
//! An argument wins over a `FOREBAY_*` variable, the variable over the file that `FOREBAY_CONFIG`
//! names, and the file over the default. Unusable values are errors, and all of them are reported
//! together.

use std::collections::BTreeMap;

use super::environment::Environment;
use super::framework::Framework;
use super::ranks::{self, Ranks};
use super::setting::{Role, Setting, SettingKind};
use super::sources::{arguments, file, variables};
use super::values::Value;
use super::{Config, all};
use crate::error::{Error, Result};

/// Settings that may be taken from the environment and the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Operational settings, the rank, and `model_parallel_size`. A variable must not silently
    /// change the data of an explicit call.
    OperationalOnly,
    /// Every setting.
    All,
}

/// The value of a setting, and its origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Name of the setting.
    pub name: &'static str,
    /// Its value, as text.
    pub value: String,
    /// `argument`, a variable, a file, `default`, or the computation of the value.
    pub origin: String,
}

/// Settings in force.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The settings, with rank, world size and threads filled in. They are not validated.
    pub config: Config,
    /// The origin of each setting, in the order of the table.
    pub origins: Vec<Origin>,
    /// Probable mistakes.
    pub warnings: Vec<String>,
    /// Assumptions that were made.
    pub notes: Vec<String>,
    /// Settings whose values come from the framework.
    pub implied: Vec<&'static str>,
}

impl Resolved {
    /// Fails if page-locked memory is asked for. A loader that cannot give it calls this.
    pub fn refuse_pinning(&self) -> Result<()> {
        if !self.config.pin_memory {
            return Ok(());
        }
        let origin = self.origins.iter().find(|origin| origin.name == "pin_memory");
        let origin = origin.map_or("default", |origin| origin.origin.as_str());
        let text = "`pin_memory` needs forebay.torch.DataLoader: only torch's memory can be page-locked";
        Err(Error::config(format!("{text} (set by {origin})")))
    }
}

/// Resolves the settings from the arguments `explicit` (names and values), `env`, and the file
/// that `env` names.
///
/// If an argument is given twice, the last one counts. Arguments for `data` are joined to one list
/// instead. Fails with all faults, listed together.
pub fn resolve<'a, V: 'a>(explicit: &'a [(String, V)], env: &Environment, scope: Scope) -> Result<Resolved>
where
    Value: From<&'a V>,
{
    resolve_on(explicit, env, scope, None, ranks::available_cpus())
}

/// Resolves the settings of a loader inside a training framework, like [`resolve`].
///
/// The framework stands for arguments that are not given. It gives the rank if the environment does
/// not.
pub fn resolve_within<'a, V: 'a>(
    explicit: &'a [(String, V)],
    env: &Environment,
    scope: Scope,
    framework: &Framework,
) -> Result<Resolved>
where
    Value: From<&'a V>,
{
    resolve_on(explicit, env, scope, Some(framework), ranks::available_cpus())
}

fn resolve_on<'a, V: 'a>(
    explicit: &'a [(String, V)],
    env: &Environment,
    scope: Scope,
    framework: Option<&Framework>,
    cpus: u64,
) -> Result<Resolved>
where
    Value: From<&'a V>,
{
    let mut faults = Vec::new();
    let (mut warnings, mut notes) = (Vec::new(), Vec::new());
    let mut arguments = arguments(explicit, &mut faults);
    let mut implied = Vec::new();
    if let Some(framework) = framework {
        match framework.complete(&mut arguments) {
            Ok(names) => implied = names,
            Err(fault) => faults.push(fault),
        }
    }
    let variables = variables(env, &mut faults, &mut warnings);
    let file = file(env, &mut faults);

    let mut config = Config::default();
    let mut origins: BTreeMap<&str, String> = BTreeMap::new();
    let mut ignored = Vec::new();
    let mut rank_is_faulty = false;
    // The weakest source comes first. A value that a stronger source replaces is still checked.
    for (source, is_explicit) in [(&file, false), (&variables, false), (&arguments, true)] {
        for setting in all() {
            let Some(given) = source.get(setting.name) else { continue };
            let is_rank = matches!(setting.role, Role::Rank);
            if !is_explicit && !applies(setting, scope) {
                ignored.push(format!("`{}`", given.place));
                continue;
            }
            // Rank and world size are checked as a pair below.
            let mut alone = Config::default();
            let target = if is_rank { &mut alone } else { &mut config };
            match setting.set_from(target, &given.value, &given.place) {
                Ok(()) => drop(origins.insert(setting.name, given.origin.clone())),
                Err(fault) => {
                    faults.push(fault);
                    rank_is_faulty |= is_rank;
                }
            }
        }
    }
    if !ignored.is_empty() {
        notes.push(format!(
            "not applied: {}; here the training data comes from arguments, not from the environment",
            ignored.join(", ")
        ));
    }

    // A faulty number is among the faults already.
    if !rank_is_faulty {
        let own = [&arguments, &variables, &file];
        let group = framework.and_then(|framework| framework.process_group.as_ref());
        match ranks::find(&own, env, group, config.model_parallel_size, &mut warnings, &mut notes) {
            Ok(Ranks { rank, size, origin }) => {
                if group.is_some_and(|group| group.name == origin) {
                    implied.extend(["dp_rank", "dp_world_size"]);
                }
                (config.dp_rank, config.dp_world_size) = (Some(rank), Some(size));
                origins.extend([("dp_rank", origin.clone()), ("dp_world_size", origin)]);
            }
            Err(fault) => faults.push(fault),
        }
    }
    // A framework's own default gives way to the environment. `drop_last` does not.
    let follows = |framework: &&Framework| {
        !arguments.contains_key("remainder") && (framework.drops() || !origins.contains_key("remainder"))
    };
    if let Some(framework) = framework.filter(follows) {
        let (remainder, origin) = framework.remainder(config.dp_world_size.unwrap_or(1));
        config.remainder = remainder;
        origins.insert("remainder", origin.to_owned());
        implied.push("remainder");
    }
    if let Some(format) = config.batch_format.filter(|_| !origins.contains_key("targets")) {
        config.targets = format.targets();
        origins.insert("targets", format!("`batch_format` = {}", format.name()));
    }
    if config.num_threads.is_none() {
        let (count, arithmetic) = ranks::threads(env, cpus, &mut warnings);
        config.num_threads = Some(count);
        origins.insert("num_threads", arithmetic);
    }
    if !faults.is_empty() {
        return Err(Error::all(faults));
    }
    let origin = |setting: &Setting| Origin {
        name: setting.name,
        value: setting.text(&config),
        origin: origins.remove(setting.name).unwrap_or_else(|| "default".to_owned()),
    };
    let origins = all().iter().map(origin).collect();
    Ok(Resolved { config, origins, warnings, notes, implied })
}

/// Whether `scope` takes the setting from the environment and the file.
fn applies(setting: &Setting, scope: Scope) -> bool {
    scope == Scope::All
        || setting.kind() == SettingKind::Operational
        || matches!(setting.role, Role::Rank | Role::Peers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::settings::{MeshDimension, ProcessGroup, Remainder, Sampler, Shuffle, default_threads};

    fn env(pairs: &[(&str, &str)]) -> Environment {
        Environment::from_pairs(pairs.iter().copied())
    }

    fn explicit(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
    }

    fn settle(arguments: &[(&str, &str)], variables: &[(&str, &str)]) -> Result<Resolved> {
        resolve_on(&explicit(arguments), &env(variables), Scope::All, None, 16)
    }

    fn origin<'a>(resolved: &'a Resolved, name: &str) -> &'a str {
        &resolved.origins.iter().find(|origin| origin.name == name).unwrap().origin
    }

    /// Writes `text` to a file, which is deleted on drop.
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
        let resolved = settle(&[("seed", "300")], &variables).unwrap();
        let config = &resolved.config;
        assert_eq!((config.seq_len, config.batch_size, config.seed, config.lanes), (1, 20, 300, 8));
        assert_eq!(origin(&resolved, "seq_len"), path);
        assert_eq!(origin(&resolved, "batch_size"), "FOREBAY_BATCH_SIZE");
        assert_eq!(origin(&resolved, "seed"), "argument");
        assert_eq!(origin(&resolved, "lanes"), "default");
        assert_eq!(resolved.origins.len(), all().len());
        assert_eq!(resolved.origins.iter().find(|origin| origin.name == "seed").unwrap().value, "300");
        assert!(resolved.warnings.is_empty() && resolved.notes.is_empty(), "{resolved:?}");
    }

    #[test]
    fn files_have_native_types() {
        let (_file, path) = file(
            "data = ['a,b', \"c\"]\nshuffle = true\npin_memory = true\nmemory_budget = '1GiB'\nformat = 'arrow'\neos_id = 7\n",
        );
        let config = settle(&[], &[("FOREBAY_CONFIG", &path)]).unwrap().config;
        assert_eq!(config.data, ["a,b", "c"]);
        assert_eq!((config.shuffle, config.memory_budget, config.eos_id), (Shuffle::On, 1 << 30, Some(7)));
        assert!(config.pin_memory);
    }

    #[test]
    fn faults_of_files_name_key_and_file() {
        let (_file, path) = file("seqlen = 1\nbatch_size = -1\nlanes = [1]\nseed = 1.5\n");
        let report = settle(&[], &[("FOREBAY_CONFIG", &path)]).unwrap_err().report();
        for words in [
            format!("key `seqlen` of `{path}` is unknown: did you mean `seq_len`?"),
            format!("`{path}: batch_size` must be an integer from 1 to 2^32, found `-1`"),
            format!("`{path}: lanes` must be an integer from 1 to 2^20, found a value of type list"),
            format!("`{path}: seed` must be"),
        ] {
            assert!(report.contains(&words), "{report}");
        }
        let (_file, path) = file("seq_len = 1\nseed = \n");
        let report = settle(&[], &[("FOREBAY_CONFIG", &path)]).unwrap_err().report();
        assert!(report.contains("not valid TOML in line 2") && report.contains(&path), "{report}");
        let missing = settle(&[], &[("FOREBAY_CONFIG", "/nowhere/forebay.toml")]).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::Config);
        assert!(missing.report().contains("/nowhere/forebay.toml"), "{}", missing.report());
    }

    #[test]
    fn every_fault_is_listed_with_its_place() {
        let variables = [("FOREBAY_SEQ_LEN", "many"), ("FOREBAY_PIN_MEMORY", "perhaps"), ("FOREBAY_STRICT_ENV", "?")];
        let report = settle(&[("io", "tape"), ("colour", "red")], &variables).unwrap_err().report();
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
        let resolved = settle(&[], &variables).unwrap();
        assert_eq!(
            resolved.warnings,
            ["variable `FOREBAY_SEQLEN` is unknown: did you mean `FOREBAY_SEQ_LEN`?"],
            "of all these, one"
        );
        let warnings = settle(&[], &[("FOREBAY_PORTION", "1"), ("FOREBAY_HOSTS", "1")]).unwrap().warnings;
        assert_eq!(warnings.len(), 2, "names that no service has: {warnings:?}");
        let strict: Vec<_> = variables.into_iter().chain([("FOREBAY_STRICT_ENV", "1")]).collect();
        let error = settle(&[], &strict).unwrap_err();
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
        let resolved = resolve_on(&arguments, &variables, Scope::OperationalOnly, None, 16).unwrap();
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
        // From the weakest source to the strongest. Each wins over all before it.
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
        let resolved = settle(&[], &variables).unwrap();
        assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(0), Some(1)));
        assert_eq!(origin(&resolved, "dp_rank"), "default: no launcher found");
        for (index, (pairs, size, place)) in families.into_iter().enumerate() {
            variables.extend(pairs);
            let resolved = settle(&[], &variables).unwrap();
            assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(index as u64), Some(size)));
            assert_eq!(origin(&resolved, "dp_rank"), place);
            assert_eq!(origin(&resolved, "dp_world_size"), place);
            assert_eq!(resolved.notes.len(), usize::from(index < 4), "only what was found is an assumption");
            if index < 4 {
                let words = format!("assuming pure data parallel over {size} ranks (from {place})");
                assert!(resolved.notes[0].contains(&words), "{:?}", resolved.notes);
            }
        }
        let resolved = settle(&[("dp_rank", "6"), ("dp_world_size", "16")], &variables).unwrap();
        assert_eq!((resolved.config.dp_rank, resolved.config.dp_world_size), (Some(6), Some(16)));
        assert_eq!(origin(&resolved, "dp_rank"), "argument");
    }

    #[test]
    fn replicated_ranks_read_the_same_rows() {
        for rank in 0..8 {
            let rank_text = rank.to_string();
            let variables = [("RANK", rank_text.as_str()), ("WORLD_SIZE", "8"), ("FOREBAY_MODEL_PARALLEL_SIZE", "4")];
            let config = settle(&[], &variables).unwrap().config;
            assert_eq!((config.dp_rank, config.dp_world_size), (Some(rank / 4), Some(2)));
        }
        let error =
            settle(&[("model_parallel_size", "3")], &[("RANK", "0"), ("WORLD_SIZE", "8")]).unwrap_err().to_string();
        assert!(error.contains("must divide the launcher's 8 ranks"), "{error}");
        let own =
            settle(&[("dp_rank", "1"), ("dp_world_size", "2"), ("model_parallel_size", "4")], &[]).unwrap().config;
        assert_eq!((own.dp_rank, own.dp_world_size), (Some(1), Some(2)), "data-parallel ranks are data-parallel ranks");
    }

    #[test]
    fn arguments_given_twice() {
        let arguments = [("data", r"a\,b"), ("seed", "1"), ("data", "c,d"), ("seed", "2")];
        let config = settle(&arguments, &[("FOREBAY_DATA", "e")]).unwrap().config;
        assert_eq!((config.seed, config.data), (2, ["a,b", "c", "d"].map(str::to_owned).to_vec()));
    }

    #[test]
    fn half_a_pair_is_an_error_or_left_out() {
        for (arguments, variables) in [
            (&[("dp_rank", "0")][..], &[("FOREBAY_DP_WORLD_SIZE", "2")][..]),
            (&[], &[("FOREBAY_DP_WORLD_SIZE", "2"), ("RANK", "0"), ("WORLD_SIZE", "2")]),
            (&[("dp_world_size", "2")], &[]),
        ] {
            let error = settle(arguments, variables).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("belong together"), "{error}");
        }
        let variables = [("WORLD_SIZE", "8"), ("PMI_RANK", "1"), ("PMI_SIZE", "2")];
        let resolved = settle(&[], &variables).unwrap();
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
            let error = settle(&[], variables).unwrap_err();
            assert!(error.to_string().contains(words), "{error}");
        }
    }

    fn within(arguments: &[(&str, &str)], variables: &[(&str, &str)], framework: &Framework) -> Result<Resolved> {
        resolve_on(&explicit(arguments), &env(variables), Scope::OperationalOnly, Some(framework), 16)
    }

    #[test]
    fn a_framework_stands_for_arguments_that_are_not_given() {
        let sampler = Sampler { rank: 1, size: 4, seed: 7, drop_last: false };
        let framework = Framework {
            num_workers: 3,
            prefetch_factor: Some(2),
            generator_seed: Some(9),
            sampler: Some(sampler),
            ..Framework::default()
        };
        let resolved = within(&[], &[("RANK", "0"), ("WORLD_SIZE", "2")], &framework).unwrap();
        let config = &resolved.config;
        assert_eq!((config.dp_rank, config.dp_world_size, config.seed), (Some(1), Some(4), 7));
        assert_eq!((config.num_threads, config.prefetch_batches), (Some(3), 6));
        assert_eq!(config.remainder, Remainder::Pad);
        assert_eq!(origin(&resolved, "num_threads"), "num_workers");
        assert_eq!(origin(&resolved, "remainder"), "drop_last");
        let mut implied = resolved.implied.clone();
        implied.sort_unstable();
        let names = ["dp_rank", "dp_world_size", "num_threads", "prefetch_batches", "remainder", "seed"];
        assert_eq!(implied, names);
        let given =
            [("dp_rank", "0"), ("dp_world_size", "1"), ("seed", "1"), ("num_threads", "2"), ("remainder", "wrap")];
        let resolved = within(&given, &[], &framework).unwrap();
        assert_eq!(resolved.implied, ["prefetch_batches"]);
        assert!(given.iter().all(|(name, _)| origin(&resolved, name) == "argument"));
        let error = within(&[], &[], &Framework { num_workers: 2000, ..framework }).unwrap_err().to_string();
        assert!(error.contains("`num_workers` must be an integer from 0 to 1024"), "{error}");
    }

    #[test]
    fn the_remainder_follows_drop_last_and_the_number_of_ranks() {
        let one = [("dp_rank", "0"), ("dp_world_size", "1")];
        let two = [("dp_rank", "0"), ("dp_world_size", "2")];
        let sampler = |drop_last| Sampler { rank: 0, size: 1, seed: 0, drop_last };
        for (ranks, drop_last, sampler, remainder) in [
            (one, false, None, Remainder::Short),
            (one, true, None, Remainder::Drop),
            (one, false, Some(sampler(true)), Remainder::Drop),
            (two, false, Some(sampler(false)), Remainder::Pad),
            (two, true, None, Remainder::Drop),
        ] {
            let framework = Framework { drop_last, sampler, ..Framework::default() };
            assert_eq!(within(&ranks, &[], &framework).unwrap().config.remainder, remainder);
        }
    }

    #[test]
    fn a_process_group_and_a_launcher_agree_or_are_refused() {
        let framework = |rank, size| {
            let process_group = Some(ProcessGroup { name: "the group", rank, size });
            Framework { process_group, ..Framework::default() }
        };
        let ranks = |resolved: &Resolved| (resolved.config.dp_rank.unwrap(), resolved.config.dp_world_size.unwrap());
        let launcher = [("RANK", "3"), ("WORLD_SIZE", "4")];
        let resolved = within(&[], &[], &framework(3, 4)).unwrap();
        assert_eq!((ranks(&resolved), origin(&resolved, "dp_rank")), ((3, 4), "the group"));
        assert!(resolved.notes[0].contains("assuming pure data parallel over 4 ranks (from the group)"));
        assert_eq!(ranks(&within(&[], &launcher, &framework(3, 4)).unwrap()), (3, 4));
        let own = [("FOREBAY_DP_RANK", "0"), ("FOREBAY_DP_WORLD_SIZE", "2")];
        assert_eq!(ranks(&within(&[], &own, &framework(3, 4)).unwrap()), (0, 2));
        assert_eq!(
            ranks(&within(&[("dp_rank", "0"), ("dp_world_size", "1")], &launcher, &framework(1, 2)).unwrap()),
            (0, 1)
        );
        for (variables, group, words) in [
            (
                &launcher[..],
                framework(0, 4),
                "rank 3 of 4 was found in RANK and WORLD_SIZE, but the group says rank 0 of 4",
            ),
            (&[("FOREBAY_MODEL_PARALLEL_SIZE", "3")], framework(0, 4), "must divide the 4 ranks of the group, found 3"),
        ] {
            let error = within(&[], variables, &group).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        let peers = [("FOREBAY_MODEL_PARALLEL_SIZE", "2")];
        let resolved = within(&[], &peers, &framework(3, 4)).unwrap();
        assert_eq!((ranks(&resolved), resolved.notes.len()), ((1, 2), 0), "the environment says the peers");
    }

    #[test]
    fn a_mesh_says_the_rank() {
        let framework = |dimensions: &[(&str, u64, u64)]| {
            let dimension = |(name, rank, size): &(&str, u64, u64)| MeshDimension {
                name: Some((*name).to_owned()).filter(|name| !name.is_empty()),
                rank: *rank,
                size: *size,
            };
            Framework { mesh: Some(dimensions.iter().map(dimension).collect()), ..Framework::default() }
        };
        for (dimensions, expected) in [
            (&[("", 1, 3)][..], (1, 3)),
            (&[("dp", 1, 2), ("tp", 3, 4)], (1, 2)),
            (&[("dp_replicate", 1, 2), ("dp_shard", 2, 4), ("tp", 0, 2)], (6, 8)),
        ] {
            let config = within(&[], &[], &framework(dimensions)).unwrap().config;
            assert_eq!((config.dp_rank.unwrap(), config.dp_world_size.unwrap()), expected);
        }
        let error = within(&[], &[], &framework(&[("tp", 0, 2), ("pp", 0, 2)])).unwrap_err().to_string();
        assert!(error.contains("`mesh` needs a data-parallel dimension") && error.contains("found tp, pp"), "{error}");
        let given = [("dp_rank", "0"), ("dp_world_size", "1")];
        let error = within(&given, &[], &framework(&[("dp", 0, 2)])).unwrap_err().to_string();
        assert!(error.contains("leave `dp_rank` and `dp_world_size` out"), "{error}");
    }

    #[test]
    fn pinning_is_refused_with_its_origin() {
        for (arguments, variables, origin) in [
            (&[("pin_memory", "true")][..], &[][..], "argument"),
            (&[], &[("FOREBAY_PIN_MEMORY", "1")], "FOREBAY_PIN_MEMORY"),
        ] {
            let error = settle(arguments, variables).unwrap().refuse_pinning().unwrap_err().to_string();
            assert!(error.contains("`pin_memory`") && error.ends_with(&format!("(set by {origin})")), "{error}");
        }
        settle(&[], &[]).unwrap().refuse_pinning().unwrap();
    }

    #[test]
    fn slurm_counts_only_inside_of_a_step() {
        let size = |variables: &[(&str, &str)]| {
            let resolved = settle(&[], variables).unwrap();
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
            let resolved = resolve_on(&explicit(&[]), &env(variables), Scope::OperationalOnly, None, cpus).unwrap();
            assert_eq!(resolved.config.num_threads, Some(count), "{text}");
            assert_eq!(origin(&resolved, "num_threads"), text);
        }
        let variables = [("LOCAL_WORLD_SIZE", "0"), ("SLURM_CPUS_PER_TASK", "x")];
        let resolved = settle(&[], &variables).unwrap();
        assert_eq!(resolved.config.num_threads, Some(8));
        assert_eq!(resolved.warnings.len(), 2, "{:?}", resolved.warnings);
        let resolved = settle(&[("num_threads", "3")], &variables).unwrap();
        assert_eq!((resolved.config.num_threads, origin(&resolved, "num_threads")), (Some(3), "argument"));
        assert!((1..=8).contains(&default_threads()));
    }
}
