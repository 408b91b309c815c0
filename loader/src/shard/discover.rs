//! stand-in until merge
use crate::config::DataFormat;
use crate::error::Result;
use std::path::PathBuf;
/// x
#[derive(Clone, Debug)]
pub struct ShardFile {
    /// p
    pub path: PathBuf,
    /// n
    pub name: String,
}
/// x
pub fn find(_data: &[String], _format: DataFormat) -> Result<Vec<ShardFile>> {
    todo!()
}
