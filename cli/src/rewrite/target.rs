//! Refuses a folder for the result that is inside the sources.

use std::path::{Component, Path, PathBuf};

use forebay::Error;

/// Fails if a later search of the sources would find the result.
pub(super) fn refuse_inside(target: &Path, data: &[String]) -> forebay::Result<()> {
    let real = real(target);
    for entry in data {
        let path = Path::new(entry);
        let searched = if path.is_dir() {
            path.to_owned()
        } else if !path.exists() && entry.contains(['*', '?', '[']) {
            let is_fixed = |part: &Component<'_>| !part.as_os_str().to_string_lossy().contains(['*', '?', '[']);
            let fixed: PathBuf = path.components().take_while(is_fixed).collect();
            // A pattern of file names alone does not look into folders.
            if path.components().count() == fixed.components().count() + 1 {
                continue;
            }
            fixed
        } else {
            continue;
        };
        if real.starts_with(self::real(&searched)) {
            return Err(Error::config(format!(
                "`{}` is inside of `{entry}`, so that the result would be taken for a part of the source: name a folder outside of it",
                target.display()
            )));
        }
    }
    Ok(())
}

/// The path without links and dots, as far as it exists.
fn real(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let there = path.ancestors().find_map(|folder| Some((folder, folder.canonicalize().ok()?)));
    match there {
        Some((folder, real)) => real.join(path.strip_prefix(folder).unwrap_or(Path::new(""))),
        None => path,
    }
}
