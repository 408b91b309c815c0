//! Settings from names and texts.

use std::str::FromStr;

use forebay::config::{Config, DataFormat, Io, Remainder, Shuffle, Targets};
use forebay::tokens::Dtype;
use forebay::{Error, Result};

pub(crate) fn config_from_pairs(pairs: &[(String, String)]) -> Result<Config> {
    let mut config = Config::default();
    let mut faults = Vec::new();
    for (name, text) in pairs {
        if let Err(error) = set(&mut config, name, text) {
            faults.push(error);
        }
    }
    if faults.is_empty() { Ok(config) } else { Err(Error::all(faults)) }
}

fn set(config: &mut Config, name: &str, text: &str) -> Result<()> {
    match name {
        "data" => config.data.push(text.to_owned()),
        "format" => {
            config.format = choice(
                name,
                text,
                &[("auto", DataFormat::Auto), ("parquet", DataFormat::Parquet), ("arrow", DataFormat::Arrow)],
            )?;
        }
        "token_column" => config.token_column = Some(text.to_owned()),
        "seq_len" => config.seq_len = number(name, text)?,
        "targets" => {
            config.targets = choice(name, text, &[("labels", Targets::Labels), ("shifted", Targets::Shifted)])?;
        }
        "bos_id" => config.bos_id = Some(number(name, text)?),
        "eos_id" => config.eos_id = Some(number(name, text)?),
        "shuffle" => {
            config.shuffle = choice(
                name,
                text,
                &[
                    ("false", Shuffle::Off),
                    ("true", Shuffle::On),
                    ("global", Shuffle::Global),
                    ("block", Shuffle::Block),
                ],
            )?;
        }
        "seed" => config.seed = number(name, text)?,
        "chunk_tokens" => config.chunk_tokens = number(name, text)?,
        "window_tokens" => config.window_tokens = number(name, text)?,
        "lanes" => config.lanes = number(name, text)?,
        "batch_size" => config.batch_size = number(name, text)?,
        "dp_rank" => config.dp_rank = Some(number(name, text)?),
        "dp_world_size" => config.dp_world_size = Some(number(name, text)?),
        "remainder" => {
            config.remainder = choice(
                name,
                text,
                &[
                    ("drop", Remainder::Drop),
                    ("pad", Remainder::Pad),
                    ("wrap", Remainder::Wrap),
                    ("short", Remainder::Short),
                ],
            )?;
        }
        "pad_id" => config.pad_id = number(name, text)?,
        "input_dtype" => config.input_dtype = choice(name, text, &[("int64", Dtype::I64), ("int32", Dtype::I32)])?,
        "num_threads" => config.num_threads = Some(number(name, text)?),
        "prefetch_batches" => config.prefetch_batches = number(name, text)?,
        "memory_budget" => config.memory_budget = number(name, text)?,
        "block_tokens" => config.block_tokens = number(name, text)?,
        "io" => config.io = choice(name, text, &[("auto", Io::Auto), ("mmap", Io::Mmap), ("pread", Io::Pread)])?,
        "pin_memory" => config.pin_memory = choice(name, text, &[("false", false), ("true", true)])?,
        _ => return Err(Error::config(format!("there is no setting `{name}`"))),
    }
    Ok(())
}

fn number<T: FromStr>(name: &str, text: &str) -> Result<T> {
    text.parse().map_err(|_| Error::config(format!("`{name}` must be a whole number, found `{text}`")))
}

fn choice<T: Copy>(name: &str, text: &str, choices: &[(&str, T)]) -> Result<T> {
    let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
    choices
        .iter()
        .find(|(name, _)| *name == text)
        .map(|(_, value)| *value)
        .ok_or_else(|| Error::config(format!("`{name}` must be one of {}, found `{text}`", names.join(", "))))
}
