//! Saved tables: lists of numbers that follow from a corpus and some settings.
//!
//! A layout makes such a table from all document lengths. With the saved table, a start does not
//! look at the lengths. The file is a cache, like the index: a checksum covers every byte, and a
//! key stands for all that the table depends on. A file with another key is made anew.

use std::path::PathBuf;

use xxhash_rust::xxh3::xxh3_64;

use crate::error::{Error, Result};
use crate::storage::Files;

const MAGIC: &[u8; 8] = b"forebayW";
/// Bytes before the numbers: magic, key, checksum.
const HEADER: usize = 32;

/// The file that holds a table.
#[derive(Clone, Debug)]
pub struct TableFile {
    pub(super) files: Files,
    pub(super) path: PathBuf,
    pub(super) key: u128,
}

impl TableFile {
    /// Loads the table. Returns `None` if there is no file, or if it was saved for another key.
    pub fn load(&self) -> Result<Option<Vec<u64>>> {
        let Some(bytes) = self.files.read_if_there(&self.path)? else { return Ok(None) };
        let damaged = || Error::data("saved table is damaged").at(&self.path);
        if bytes.len() < HEADER || !bytes.len().is_multiple_of(8) || &bytes[..8] != MAGIC {
            return Err(damaged());
        }
        if bytes[24..HEADER] != checksum_of(&bytes).to_le_bytes() {
            return Err(damaged());
        }
        if bytes[8..24] != self.key.to_le_bytes() {
            return Ok(None);
        }
        Ok(Some(bytes[HEADER..].as_chunks().0.iter().map(|word| u64::from_le_bytes(*word)).collect()))
    }

    /// Saves `table`, and replaces the previous file.
    pub fn save(&self, table: &[u64]) -> Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + size_of_val(table));
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&self.key.to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend(table.iter().flat_map(|word| word.to_le_bytes()));
        let checksum = checksum_of(&bytes);
        bytes[24..HEADER].copy_from_slice(&checksum.to_le_bytes());
        self.files.replace(&self.path, &bytes).map_err(|error| error.context("cannot write saved table"))
    }
}

/// The checksum of all bytes but its own.
fn checksum_of(bytes: &[u8]) -> u64 {
    xxh3_64(&bytes[..24]) ^ xxh3_64(&bytes[HEADER..])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_comes_back_for_its_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        let file = |key| TableFile { files: Files::local(), path: folder.path().join("table"), key };
        assert_eq!(file(1).load().unwrap(), None);
        for table in [vec![], vec![7], (0..1000).map(|word| word << 40 | 5).collect::<Vec<u64>>()] {
            file(1).save(&table).unwrap();
            assert_eq!(file(1).load().unwrap(), Some(table));
            assert_eq!(file(2).load().unwrap(), None);
        }
    }

    #[test]
    fn a_changed_or_missing_byte_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let file = TableFile { files: Files::local(), path: folder.path().join("table"), key: 5 };
        file.save(&[1, 2, 3]).unwrap();
        let bytes = std::fs::read(&file.path).unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            std::fs::write(&file.path, &changed).unwrap();
            assert!(file.load().is_err(), "byte {at}");
            std::fs::write(&file.path, &bytes[..at]).unwrap();
            assert!(file.load().is_err(), "cut to {at} bytes");
        }
    }
}
