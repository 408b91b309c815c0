//! Refuses folders that are not plain corpora.
//!
//! Such folders are tables with a log, folders with several splits, and caches of `datasets`.

use std::collections::BTreeMap;
use std::path::Path;

use crate::corpus::discover::ShardFile;
use crate::error::{Error, Result};
use crate::storage::{self, Files, Item, ItemKind};

/// Prefix of the files in which `datasets` keeps the results of `map` and `filter`.
pub(super) const CACHE_PREFIX: &str = "cache-";
/// Number of digits of the fingerprint after the prefix.
const FINGERPRINT: usize = 16;
/// Number of parent folders that are searched for a log. Partitions of a table rarely lie deeper.
const PARENTS: usize = 4;

/// Folders with the log of a table, each with the kind of table.
const TABLE_LOGS: [(&str, &str); 3] = [("_delta_log", "Delta"), (".hoodie", "Hudi"), (ICEBERG_LOG, "Iceberg")];
/// A folder of any kind may have this name. It is the log of a table if it holds a file that ends
/// in [`ICEBERG_FILE`].
const ICEBERG_LOG: &str = "metadata";
const ICEBERG_FILE: &str = ".metadata.json";

/// Words that name a split, each with its split.
const SPLITS: [(&str, &str); 9] = [
    ("train", "train"),
    ("training", "train"),
    ("test", "test"),
    ("testing", "test"),
    ("validation", "validation"),
    ("valid", "validation"),
    ("val", "validation"),
    ("dev", "validation"),
    ("eval", "validation"),
];

/// The names of folders with logs of tables.
pub(super) fn logs() -> Vec<&'static str> {
    TABLE_LOGS.iter().map(|(log, _)| *log).collect()
}

/// Fails if `folder`, which holds `items`, is a table with a log that says which files are live.
pub(super) fn check_table(files: &Files, folder: &Path, items: &[Item]) -> Result<()> {
    for item in items.iter().filter(|item| item.kind == ItemKind::Folder) {
        let Some((log, kind)) = TABLE_LOGS.iter().find(|(log, _)| *log == item.name) else { continue };
        if *log == ICEBERG_LOG && !files.list(&item.location)?.iter().any(|item| item.name.ends_with(ICEBERG_FILE)) {
            continue;
        }
        return Err(Error::config(format!(
            "`{}` is a table of {kind}: its log in `{log}` says which files are live, and others hold removed rows; \
             name the live files one by one, or write the table's rows to plain Parquet files",
            folder.display()
        )));
    }
    Ok(())
}

/// Fails if `folder` lies in a table with a log.
pub(super) fn check_parents(files: &Files, folder: &Path) -> Result<()> {
    let absolute = files.absolute(folder);
    let store = storage::store_of(&absolute);
    let is_inside = |parent: &&Path| store.is_none_or(|store| parent.starts_with(store));
    for parent in absolute.ancestors().take(1 + PARENTS).take_while(is_inside) {
        for (log, _) in TABLE_LOGS {
            let location = parent.join(log);
            // A folder that cannot be read is not the log of a table.
            let Ok(Some(stat)) = files.stat_if_there(&location) else { continue };
            if stat.kind == ItemKind::Folder {
                let item = Item { name: log.to_owned(), location, kind: stat.kind, is_link: false };
                check_table(files, parent, &[item])?;
            }
        }
    }
    Ok(())
}

/// Fails if the names of `shards`, found below `folder`, name more than one split.
pub(super) fn check_splits<'a>(folder: &Path, shards: impl Iterator<Item = &'a ShardFile>) -> Result<()> {
    let mut splits: BTreeMap<&str, &str> = BTreeMap::new();
    for shard in shards {
        if let Some(split) = split_of(&shard.name) {
            splits.entry(split).or_insert(&shard.name);
        }
    }
    if splits.len() < 2 {
        return Ok(());
    }
    let (names, examples): (Vec<_>, Vec<_>) = splits.into_iter().unzip();
    Err(Error::config(format!(
        "`{}` holds several splits ({}), such as `{}`: name the one to train on by its folder or by a pattern like \
         `{}`; to read all of them, list a pattern for each",
        folder.display(),
        names.join(", "),
        examples.join("` and `"),
        folder.join("**/train*").display(),
    )))
}

/// Returns the split that a word of `name` names.
fn split_of(name: &str) -> Option<&'static str> {
    let words = name.split(|c: char| !c.is_alphabetic());
    let known = |word: &str| SPLITS.iter().find(|(known, _)| word.eq_ignore_ascii_case(known));
    words.filter_map(known).map(|(_, split)| *split).next()
}

/// Fails if one of `shards`, found below `folder`, is a cache of `datasets`.
///
/// The rows of a cache are copies of rows of other files, or are made from them.
pub(super) fn check_caches<'a>(folder: &Path, mut shards: impl Iterator<Item = &'a ShardFile>) -> Result<()> {
    let Some(cache) = shards.find(|shard| is_cache(shard.name.rsplit('/').next().unwrap_or_default())) else {
        return Ok(());
    };
    Err(Error::config(format!(
        "`{}` holds caches of `datasets` such as `{}`, whose rows are copies of others or come from them: write the \
         dataset with `save_to_disk` and name that folder, or name the files one by one",
        folder.display(),
        cache.name
    )))
}

fn is_cache(name: &str) -> bool {
    let rest = name.strip_prefix(CACHE_PREFIX).unwrap_or_default().as_bytes();
    rest.len() > FINGERPRINT
        && rest[..FINGERPRINT].iter().all(u8::is_ascii_hexdigit)
        && !rest[FINGERPRINT].is_ascii_alphanumeric()
}
