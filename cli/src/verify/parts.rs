//! Saves what a part of a proof has found, and adds the parts up.
//!
//! A part is a file in the folder of the proof. It holds the two sums of the part, and a
//! description of the proof, which must be the same in all parts.

use std::path::{Path, PathBuf};

use forebay::corpus::parts::{Part, complete_count};
use forebay::proof::checksum::Checksum;
use forebay::storage::Files;
use forebay::{Error, ErrorKind, Loader, Result};
use serde_json::{Value, json};

use super::coverage_json;

/// The rows that a loader delivered, and those that the files hold.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sums {
    pub(super) found: Checksum,
    pub(super) expected: Checksum,
}

/// Describes a proof of the positions `from` to `to` of an epoch.
pub(super) fn description(loader: &Loader, epoch: u64, from: u64, to: u64, world_size: u64) -> Value {
    let settings: serde_json::Map<String, Value> =
        loader.content_settings().into_iter().map(|(name, value)| (name, value.into())).collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "epoch": epoch,
        "position": from,
        "end": to,
        "world_size": world_size,
        "batch_size": loader.config().batch_size,
        "remainder": loader.config().remainder.name(),
        "corpus": loader.corpora().map(|(_, corpus)| corpus.fingerprint().to_owned()).collect::<Vec<_>>(),
        "settings": settings,
    })
}

/// Saves the sums of `part`. Returns the file.
pub(super) fn save(folder: &Path, part: Part, description: &Value, sums: Sums) -> Result<PathBuf> {
    let path = folder.join(format!("part-{}.json", part.to_string().replace('/', "-of-")));
    let Sums { found, expected } = sums;
    let value = json!({
        "part": part.to_string(),
        "proof": description,
        "found": coverage_json(&found),
        "expected": coverage_json(&expected),
    });
    Files::local().replace(&path, format!("{value}\n").as_bytes())?;
    Ok(path)
}

/// Adds up all parts in `folder`. Fails with the names of those that are missing, or that proved
/// something else.
pub(super) fn add_up(folder: &Path, description: &Value) -> Result<Sums> {
    let part_of = |name: &str| -> Option<Part> {
        name.strip_prefix("part-")?.strip_suffix(".json")?.replace("-of-", "/").parse().ok()
    };
    let files = Files::local();
    let items = if files.stat_if_there(folder)?.is_some() { files.list(folder)? } else { Vec::new() };
    let mut found: Vec<(Part, PathBuf)> =
        items.into_iter().filter_map(|item| Some((part_of(&item.name)?, item.location))).collect();
    found.sort_unstable();
    complete_count(&found, folder)?;
    let mut sums = Sums::default();
    for (part, path) in found {
        let bytes = files.read_if_there(&path)?.unwrap_or_default();
        let more = sums_of(&bytes, part, description).map_err(|error| error.at(&path))?;
        sums.found += more.found;
        sums.expected += more.expected;
    }
    Ok(sums)
}

fn sums_of(bytes: &[u8], part: Part, description: &Value) -> Result<Sums> {
    let damaged = || Error::data(format!("part {part} is damaged: run it again"));
    let value: Value = serde_json::from_slice(bytes).map_err(|error| damaged().with_source(error))?;
    if value["part"] != part.to_string() {
        return Err(Error::data(format!("this is part {} under the name of {part}: run {part} again", value["part"])));
    }
    let Some(keys) = description.as_object() else { return Err(damaged()) };
    for (key, here) in keys {
        let there = &value["proof"][key];
        if there != here {
            let text =
                format!("part {part} proved something else: `{key}` is {there} there and {here} here; run it again");
            return Err(Error::new(ErrorKind::State, text));
        }
    }
    let sum = |key: &str| {
        let number = |of: &str| value[key][of].as_u64();
        let hash = value[key]["hash"].as_str().and_then(|hash| u128::from_str_radix(hash, 16).ok());
        Some(Checksum { rows: number("rows")?, tokens: number("tokens")?, hash: hash? })
    };
    let sums = || Some(Sums { found: sum("found")?, expected: sum("expected")? });
    sums().ok_or_else(damaged)
}
