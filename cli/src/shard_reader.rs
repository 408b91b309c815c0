//! An open shard, as the readers of arrow-rs and parquet take it.

use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use bytes::Bytes;
use forebay::Result;
use forebay::settings::Io;
use forebay::storage::{Files, SourceFile};
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

/// Most bytes of one read from front to back.
const READ: u64 = 1 << 20;

/// A shard that is read from front to back, or at any offset.
#[derive(Debug)]
pub(crate) struct ShardReader {
    file: SourceFile,
    at: u64,
}

impl ShardReader {
    pub(crate) fn open(files: &Files, path: &Path) -> Result<Self> {
        Ok(Self { file: files.open(path, Io::Pread)?, at: 0 })
    }
}

impl Read for ShardReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let end = self.file.len().min(self.at.saturating_add((buffer.len() as u64).min(READ)));
        if end <= self.at {
            return Ok(0);
        }
        let bytes = self.file.bytes(self.at..end).map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        self.at = end;
        Ok(bytes.len())
    }
}

impl Seek for ShardReader {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let place = match to {
            SeekFrom::Start(place) => Some(place),
            SeekFrom::End(offset) => self.file.len().checked_add_signed(offset),
            SeekFrom::Current(offset) => self.at.checked_add_signed(offset),
        };
        self.at = place.ok_or_else(|| io::Error::other("cannot go to a place before the file"))?;
        Ok(self.at)
    }
}

impl Length for ShardReader {
    fn len(&self) -> u64 {
        self.file.len()
    }
}

impl ChunkReader for ShardReader {
    type T = io::BufReader<Self>;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self::T> {
        Ok(io::BufReader::new(Self { file: self.file.clone(), at: start }))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        let end = start.saturating_add(length as u64);
        self.file.bytes(start..end).map_err(|error| ParquetError::External(Box::new(error)))
    }
}
