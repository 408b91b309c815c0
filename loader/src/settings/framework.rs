//! Policies for a loader inside a training framework: which of its parameters stand for settings.
//!
//! A binding fills [`Framework`] with facts. [`super::resolve_within`] decides what they mean: the
//! rank, the seed, the number of threads, and the treatment of the remainder. An argument of the
//! same setting always wins.

use super::sources::{GivenValue, GivenValues};
use super::{Remainder, Value};
use crate::error::{Error, Result};

/// The facts that a training framework states beside the settings.
#[derive(Clone, Debug, Default)]
pub struct Framework {
    /// Whether a last batch that is not full is left out.
    pub drop_last: bool,
    /// Number of workers. 0 leaves the number of threads to Forebay.
    pub num_workers: u64,
    /// Batches that each worker computes ahead.
    pub prefetch_factor: Option<u64>,
    /// Seed of the generator.
    pub generator_seed: Option<u64>,
    /// The sampler that deals samples out to ranks.
    pub sampler: Option<Sampler>,
    /// Dimensions of the mesh of devices.
    pub mesh: Option<Vec<MeshDimension>>,
    /// The group of processes that run together.
    pub process_group: Option<ProcessGroup>,
}

/// A sampler that deals samples out to ranks.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// Rank of this process.
    pub rank: u64,
    /// Number of ranks.
    pub size: u64,
    /// Seed of its order.
    pub seed: u64,
    /// Whether it leaves out samples that not every rank gets.
    pub drop_last: bool,
}

/// A dimension of a mesh of devices.
#[derive(Clone, Debug)]
pub struct MeshDimension {
    /// Name, if it has one.
    pub name: Option<String>,
    /// Place of this process along it.
    pub rank: u64,
    /// Number of places.
    pub size: u64,
}

/// A group of processes that the framework started.
#[derive(Clone, Debug)]
pub struct ProcessGroup {
    /// Name of the library that made it, for messages.
    pub name: &'static str,
    /// Rank of this process.
    pub rank: u64,
    /// Number of processes.
    pub size: u64,
}

/// Names of mesh dimensions whose ranks read different rows.
const DATA_PARALLEL: [&str; 6] = ["dp_replicate", "dp_shard", "dp", "ddp", "fsdp", "data"];

impl Framework {
    /// Adds the settings that the facts stand for to `arguments`. Returns their names.
    pub(super) fn complete(&self, arguments: &mut GivenValues) -> Result<Vec<&'static str>> {
        let has_rank = arguments.contains_key("dp_rank") || arguments.contains_key("dp_world_size");
        let mut implied: Vec<(&'static str, u64, &'static str)> = Vec::new();
        if let Some(mesh) = &self.mesh {
            if has_rank {
                let text = "`mesh` says the data-parallel rank: leave `dp_rank` and `dp_world_size` out";
                return Err(Error::config(text));
            }
            let (rank, size) = rank_in(mesh)?;
            implied.extend([("dp_rank", rank, "mesh"), ("dp_world_size", size, "mesh")]);
        } else if let Some(Sampler { rank, size, .. }) = self.sampler.filter(|_| !has_rank) {
            implied.extend([("dp_rank", rank, "sampler.rank"), ("dp_world_size", size, "sampler.num_replicas")]);
        }
        match (&self.sampler, self.generator_seed) {
            (Some(sampler), _) => implied.push(("seed", sampler.seed, "sampler.seed")),
            (None, Some(seed)) => implied.push(("seed", seed, "generator.initial_seed()")),
            (None, None) => {}
        }
        if self.num_workers > 0 {
            implied.push(("num_threads", self.num_workers, "num_workers"));
        }
        if let Some(factor) = self.prefetch_factor {
            let batches = factor.saturating_mul(self.num_workers.max(1));
            implied.push(("prefetch_batches", batches, "prefetch_factor"));
        }
        implied.retain(|(name, ..)| !arguments.contains_key(name));
        for (name, number, place) in &implied {
            let (value, place) = (Value::from(*number), (*place).to_owned());
            arguments.insert(name, GivenValue { value, origin: place.clone(), place });
        }
        Ok(implied.into_iter().map(|(name, ..)| name).collect())
    }

    /// Whether a last batch that is not full is left out.
    pub(super) fn drops(&self) -> bool {
        self.drop_last || self.sampler.is_some_and(|sampler| sampler.drop_last)
    }

    /// The treatment of the remainder on each of `ranks` ranks, and the parameter that says it.
    ///
    /// A single rank gets a short last batch, as from the framework's own loader. Several ranks
    /// need the same number of full batches, or their collective operations would wait for ever.
    pub(super) fn remainder(&self, ranks: u64) -> (Remainder, &'static str) {
        let remainder = match ranks {
            _ if self.drops() => Remainder::Drop,
            1 => Remainder::Short,
            _ => Remainder::Pad,
        };
        (remainder, "drop_last")
    }
}

/// The data-parallel rank and number of ranks in `mesh`. The first of several data-parallel
/// dimensions varies slowest.
fn rank_in(mesh: &[MeshDimension]) -> Result<(u64, u64)> {
    let is_parallel =
        |dimension: &&MeshDimension| dimension.name.as_deref().is_some_and(|name| DATA_PARALLEL.contains(&name));
    let mut dimensions: Vec<_> = mesh.iter().filter(is_parallel).collect();
    if dimensions.is_empty() && mesh.len() == 1 {
        dimensions.extend(mesh);
    }
    if dimensions.is_empty() {
        let names: Vec<_> = mesh.iter().filter_map(|dimension| dimension.name.as_deref()).collect();
        let found = if names.is_empty() { "no names".to_owned() } else { names.join(", ") };
        return Err(Error::config(format!(
            "`mesh` needs a data-parallel dimension, named {}; found {found}: pass the part of the mesh that is \
             data-parallel, such as mesh['my_dp']",
            DATA_PARALLEL.join(", ")
        )));
    }
    let step = |(rank, size), found: &MeshDimension| (rank * found.size + found.rank, size * found.size);
    Ok(dimensions.into_iter().fold((0, 1), step))
}
