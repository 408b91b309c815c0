//! Proves an epoch, or the rest of an epoch. It runs a loader for each rank, and compares the
//! result with the files.

use std::path::Path;
use std::time::Duration;

use forebay::corpus::parts::Part;
use forebay::loader::Next;
use forebay::loader::state::State;
use forebay::proof::checksum::Checksum;
use forebay::settings::{Config, Phase, Remainder};
use forebay::{Error, Loader};
use indicatif::ProgressBar;
use serde_json::json;

use super::parts::{self, Sums};
use super::{Options, PROVEN, TEMPLATE, Wanted, coverage_json, coverage_text, expected, write_json};
use crate::report::{grouped, line, number_of};
use crate::{Context, FAILED, Failure, progress};

/// Runs every rank of an epoch, one after the other, and compares the sum with the files.
pub(super) fn run(
    config: Config,
    world_size: u64,
    options: &Options,
    state: Option<&State>,
    context: &mut Context<'_>,
) -> Result<u8, Failure> {
    let open = |rank| Loader::open(Config { dp_rank: Some(rank), dp_world_size: Some(world_size), ..config.clone() });
    let mut loader = open(0)?;
    let epoch = state.map_or(options.epoch.unwrap_or(0), State::epoch);
    if let Some(state) = state {
        loader.load_state(state)?;
    }
    let (chain, _) = loader.epoch_chain(epoch..epoch + 1);
    let Some(positions) = chain.len() else {
        return Err(Error::config("this mixture has no end: prove a run of it by its delivery log").into());
    };
    let from = state.map_or(0, |state| chain.index_of(state.epoch(), state.position())).min(positions);
    let global_batch = config.batch_size * world_size;
    let to = match config.remainder {
        Remainder::Drop => positions - (positions - from) % global_batch,
        Remainder::Pad | Remainder::Wrap | Remainder::Short => positions,
    };

    let description = parts::description(&loader, epoch, from, to, world_size);
    let folder = options.proof.as_deref().unwrap_or(Path::new("."));
    let Sums { found, expected } = if options.merge {
        parts::add_up(folder, &description)?
    } else {
        if options.part.is_some() && config.phase == Phase::Epoch {
            let text = "the rows of `phase` = epoch have no parts, because the last row goes on at the start: leave out `--part`";
            return Err(Error::config(text).into());
        }
        let part = options.part.unwrap_or(Part::WHOLE);
        let bar = progress::bar((to - from).div_ceil(u64::from(part.count())), TEMPLATE, context.env)?
            .with_message("streaming");
        let mut found = Checksum::default();
        for rank in (0..world_size).filter(|rank| part.takes(*rank as usize)) {
            if rank > 0 {
                loader = open(rank)?;
            }
            found += delivered(&loader, state, epoch, &bar)?;
        }
        bar.finish_and_clear();
        let order = progress::bar(0, "{msg} {spinner}", context.env)?.with_message("order");
        let wanted = [Wanted::new(&loader, epoch..epoch + 1, std::slice::from_ref(&(from..to)), &order)?];
        order.finish_and_clear();
        Sums { found, expected: expected(&loader, &wanted, part, context)?[0] }
    };
    if from >= to {
        let text = format!(
            "no position is delivered: epoch {epoch} has {positions} positions in global batches of {global_batch}"
        );
        return Err(Error::config(text).into());
    }
    if let Some(part) = options.part {
        return write_part(part, &parts::save(folder, part, &description, Sums { found, expected })?, options, context);
    }
    let proven = found == expected && expected.rows == to - from;
    if options.json {
        let value = json!({
            "proven": proven,
            "epoch": epoch,
            "position": from,
            "end": to,
            "positions": positions,
            "world_size": world_size,
            "batch_size": config.batch_size,
            "expected": coverage_json(&expected),
            "found": coverage_json(&found),
        });
        write_json(&value, context)?;
    } else {
        let out = &mut *context.out;
        line(
            out,
            "epoch",
            &format!("{epoch}, positions {} to {} of {}", grouped(from), grouped(to), grouped(positions)),
        )?;
        line(out, "ranks", &format!("{world_size}, {} each per step", number_of(config.batch_size, "sequence")))?;
        line(out, "expected", &coverage_text(&expected))?;
        line(out, "found", &coverage_text(&found))?;
        line(
            out,
            "verdict",
            if proven { PROVEN } else { "NOT PROVEN: what was delivered is not what the files hold" },
        )?;
    }
    Ok(if proven { 0 } else { FAILED })
}

/// Runs the rank of `loader` from `state` to the end of the epoch. Returns the checksum of its
/// rows.
fn delivered(loader: &Loader, state: Option<&State>, epoch: u64, bar: &ProgressBar) -> forebay::Result<Checksum> {
    loader.cover();
    if let Some(state) = state {
        loader.load_state(state)?;
    }
    loader.set_epoch(epoch);
    let mut found = Checksum::default();
    let batches = loader.iter();
    loop {
        match batches.next_timeout(Duration::from_secs(1))? {
            Next::Batch(batch) => {
                let checksum = batch.checksum.expect("asked for before the pass began");
                bar.inc(checksum.rows);
                found += checksum;
            }
            Next::End => return Ok(found),
            Next::Pending => {}
        }
    }
}

/// Prints that a part has been saved. `--merge` gives the verdict.
fn write_part(part: Part, path: &Path, options: &Options, context: &mut Context<'_>) -> Result<u8, Failure> {
    let path = path.display().to_string();
    if options.json {
        write_json(&json!({"part": part.to_string(), "file": path}), context)?;
    } else {
        line(context.out, "part", &format!("{part}, in {path}"))?;
    }
    Ok(0)
}
