//! Expands patterns: `*`, `?` and `[...]` inside a name, `**` for any number of folders.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use glob::Pattern;

use crate::error::{Error, Result};
use crate::storage::{Files, Item, ItemKind};

/// Characters that make an entry of `data` a pattern.
pub(super) const WILDCARDS: [char; 3] = ['*', '?', '['];

/// One part of a path.
enum PathPart {
    /// It is taken as it is.
    Fixed(PathBuf),
    /// The names in a folder are compared with it.
    Wildcard(Pattern),
    /// `**`: any number of folders, or none.
    AnyFolders,
}

/// Finds what `text` matches, sorted by location, and the folder in front of its first wildcard.
///
/// A folder that lies in another folder of the answer is left out of it.
pub(super) fn expand(files: &Files, text: &str) -> Result<(PathBuf, Vec<Item>)> {
    // The slashes of a scheme are no empty folder.
    let (scheme, text) = text.split_at(text.find("://").map_or(0, |at| at + 3));
    let mut fixed = PathBuf::from(scheme);
    let mut parts = Vec::new();
    for component in Path::new(text).components() {
        let name = component.as_os_str().to_string_lossy();
        let part = match component {
            Component::Normal(_) if name == "**" => PathPart::AnyFolders,
            Component::Normal(_) if name.contains(WILDCARDS) => PathPart::Wildcard(
                Pattern::new(&name)
                    .map_err(|error| Error::config(format!("`data` holds the invalid pattern `{text}`: {error}")))?,
            ),
            _ => PathPart::Fixed(PathBuf::from(component.as_os_str())),
        };
        match part {
            PathPart::Fixed(part) if parts.is_empty() => fixed.push(part),
            part => parts.push(part),
        }
    }
    let mut found = BTreeMap::new();
    expand_in(files, &fixed, &parts, &mut found)?;
    let mut items: Vec<Item> = Vec::with_capacity(found.len());
    for item in found.into_values() {
        // Paths sort by their parts, so that a folder comes right before all that lies in it.
        let is_inside = items
            .iter()
            .rev()
            .find(|item| item.kind == ItemKind::Folder)
            .is_some_and(|folder: &Item| item.location.starts_with(&folder.location));
        if !is_inside {
            items.push(item);
        }
    }
    Ok((fixed, items))
}

fn expand_in(files: &Files, folder: &Path, parts: &[PathPart], found: &mut BTreeMap<PathBuf, Item>) -> Result<()> {
    let Some((part, rest)) = parts.split_first() else { return Ok(()) };
    let listed = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let at = |item: Item| Item { location: folder.join(&item.name), ..item };
    match part {
        PathPart::Fixed(name) => {
            let location = folder.join(name);
            let Some(stat) = files.stat_if_there(&location)? else { return Ok(()) };
            let item = Item { name: name.to_string_lossy().into_owned(), location, kind: stat.kind, is_link: false };
            take(files, item, rest, found)
        }
        PathPart::Wildcard(pattern) => {
            for item in list(files, listed)?.into_iter().filter(|item| pattern.matches(&item.name)) {
                take(files, at(item), rest, found)?;
            }
            Ok(())
        }
        PathPart::AnyFolders => {
            if rest.is_empty() {
                let kind = ItemKind::Folder;
                let item = Item { name: String::new(), location: folder.to_owned(), kind, is_link: false };
                return take(files, item, rest, found);
            }
            expand_in(files, folder, rest, found)?;
            // Links are not followed, so that a loop of them ends.
            let inner = |item: &Item| item.kind == ItemKind::Folder && !item.is_link;
            for item in list(files, listed)?.into_iter().filter(inner) {
                expand_in(files, &at(item).location, parts, found)?;
            }
            Ok(())
        }
    }
}

/// Adds `item`, or expands the parts that follow in it.
fn take(files: &Files, item: Item, rest: &[PathPart], found: &mut BTreeMap<PathBuf, Item>) -> Result<()> {
    if rest.is_empty() {
        found.insert(item.location.clone(), item);
    } else if item.kind == ItemKind::Folder {
        expand_in(files, &item.location, rest, found)?;
    }
    Ok(())
}

/// Lists `folder`, which may not exist.
fn list(files: &Files, folder: &Path) -> Result<Vec<Item>> {
    match files.stat_if_there(folder)? {
        Some(stat) if stat.kind == ItemKind::Folder => files.list(folder),
        _ => Ok(Vec::new()),
    }
}
