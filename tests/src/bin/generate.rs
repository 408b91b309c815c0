//! Writes the parts of the tree that are made from the table of settings. `make generate` runs it.

use std::path::Path;
use std::{fs, io};

fn main() -> io::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (path, text, wanted) in forebay_tests::generated::files(&root)? {
        if text != wanted {
            fs::write(&path, wanted)?;
            println!("wrote {}", path.strip_prefix(&root).unwrap_or(&path).display());
        }
    }
    Ok(())
}
