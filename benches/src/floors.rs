//! Measures the work that no start can avoid, in a process that does nothing else.
//!
//! `forebay-floors footers FOLDER` opens every Arrow file of a folder and reads its footer.
//! `forebay-floors block FILE` decodes one block of a Parquet file. Each prints one JSON line.

use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use forebay::Config;
use forebay::corpus::discover::ShardFile;
use forebay::format::{self, OpenOptions, Shard};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let line = match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["footers", folder] => footers(Path::new(folder))?,
        ["block", file] => block(Path::new(file))?,
        _ => return Err("usage: forebay-floors footers FOLDER | block FILE".into()),
    };
    println!("{line}");
    Ok(())
}

fn footers(folder: &Path) -> Result<Value> {
    let began = Instant::now();
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<_>>()?;
    paths.sort();
    // A loader keeps the files open, too.
    let (mut files, mut bytes) = (Vec::with_capacity(paths.len()), 0);
    for path in paths {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut end = [0; 10];
        file.read_exact_at(&mut end, len - 10)?;
        let (footer_len, magic) = end.split_first_chunk::<4>().expect("ten bytes");
        if magic != b"ARROW1" {
            return Err("not an Arrow file".into());
        }
        let footer_len = u64::from(u32::from_le_bytes(*footer_len));
        let mut footer = vec![0; footer_len as usize];
        file.read_exact_at(&mut footer, len - 10 - footer_len)?;
        bytes += black_box(&footer).len();
        files.push(file);
    }
    Ok(json!({"ms": began.elapsed().as_secs_f64() * 1e3, "files": files.len(), "bytes": bytes}))
}

fn block(path: &Path) -> Result<Value> {
    let file = ShardFile { path: path.to_owned(), name: "floor".to_owned() };
    let shard = format::open(&file.path, &OpenOptions::of(&Config::default()))?;
    let Shard::Block(shard) = shard else { return Err("its blocks are not decoded".into()) };
    let mut times: Vec<f64> = Vec::new();
    for index in 0..shard.blocks().len().min(9) {
        let began = Instant::now();
        black_box(shard.decode(index, None)?);
        times.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let first = times[0];
    times.sort_unstable_by(f64::total_cmp);
    Ok(json!({
        "first_ms": first, "ms": times[times.len() / 2], "blocks": shard.blocks().len(), "block_tokens": shard.blocks()[0].tokens,
    }))
}
