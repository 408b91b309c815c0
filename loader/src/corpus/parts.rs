//! Indexes a corpus in parts, which several machines can run, and joins the parts.
//!
//! Part `i` of `n` opens the shards whose number leaves `i` when it is divided by `n`. It saves
//! their records in a file of its own beside the index. So a part that was killed, or that ran
//! twice, simply runs again. Joining needs the files of all parts, and opens no shard. It refuses a
//! part whose shards are not as the part found them. The joined index is the one that a single run
//! saves, byte for byte.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::corpus::checksums::SavedChecksums;
use crate::corpus::discover::{self, Discovery, ShardFile};
use crate::corpus::index::{self, IndexFile, PathHash, SavedIndex};
use crate::corpus::{
    Corpus, Indexed, NotRead, Summed, check_indexed, is_in_order, known_records, no_faults, open_on, side_by_side,
};
use crate::error::{Error, ErrorKind, Result};
use crate::format::{self, OpenOptions, ShardFacts};
use crate::settings::DataFormat;

/// Number of parts that a message names.
const NAMED_PARTS: usize = 8;

/// A share of numbered work: the numbers that leave `number` when they are divided by `count`.
///
/// Its text is `number/count`, and `0/1` stands for all of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Part {
    count: u32,
    number: u32,
}

impl Part {
    /// The part of all of the work.
    pub const WHOLE: Self = Self { count: 1, number: 0 };

    /// Part `number` of `count`. `None` if there is no such part.
    pub fn new(number: u32, count: u32) -> Option<Self> {
        (number < count).then_some(Self { count, number })
    }

    /// Number of this part.
    pub fn number(self) -> u32 {
        self.number
    }

    /// Number of all parts.
    pub fn count(self) -> u32 {
        self.count
    }

    /// Whether piece `index` of the work belongs to this part.
    pub fn takes(self, index: usize) -> bool {
        index as u64 % u64::from(self.count) == u64::from(self.number)
    }

    /// The part of `count` to which piece `index` of the work belongs.
    pub fn of(index: usize, count: u32) -> Self {
        Self { count, number: (index as u64 % u64::from(count)) as u32 }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.number, self.count)
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let numbers =
            text.split_once('/').and_then(|(number, count)| Some((number.parse().ok()?, count.parse().ok()?)));
        let part = numbers.and_then(|(number, count)| Self::new(number, count));
        part.ok_or_else(|| "expected I/N with I from 0 to N - 1, such as `0/64`".to_owned())
    }
}

/// The names of `parts`, shortened if there are many.
pub fn part_names(parts: &BTreeSet<Part>) -> String {
    let names: Vec<String> = parts.iter().take(NAMED_PARTS).map(Part::to_string).collect();
    match parts.len().saturating_sub(NAMED_PARTS) {
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// The result of indexing a part.
#[derive(Debug)]
pub struct IndexedPart {
    /// The file with the records of the part.
    pub path: PathBuf,
    /// Facts about the shards of the part, in corpus order.
    pub facts: Vec<ShardFacts>,
    /// Number of shards that were opened.
    pub opened: u64,
    /// Warnings for the user, one line each.
    pub warnings: Vec<String>,
}

/// The result of joining parts.
#[derive(Debug)]
pub struct Joined {
    /// The corpus. None of its shards is open.
    pub corpus: Corpus,
    /// The saved index.
    pub indexed: Indexed,
    /// The saved checksums, if they were asked for.
    pub summed: Option<Summed>,
    /// The files of the parts, which nobody needs any more.
    pub parts: Vec<PathBuf>,
}

/// The files and settings that all parts of an index share.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// Paths, folders and patterns.
    pub data: &'a [String],
    /// The expected format.
    pub format: DataFormat,
    /// How to open shards.
    pub options: &'a OpenOptions,
    /// The folder of the index.
    pub folder: &'a Path,
    /// Whether checksums of all shards belong to the index.
    pub checksums: bool,
}

impl Parts<'_> {
    fn file(&self) -> IndexFile {
        IndexFile::new(self.folder, self.data, self.format, self.options)
    }

    /// Indexes the shards of `part`, and saves what it finds. Opens only shards that neither an
    /// earlier run of this part nor the saved index knows.
    ///
    /// Calls `progress` with the number of opened shards and the number of shards to open.
    pub fn index(
        &self,
        part: Part,
        pool: &rayon::ThreadPool,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<IndexedPart> {
        let options = self.options;
        let Discovery { shards, mut warnings } = discover::find(&options.files, self.data, self.format)?;
        let numbered = shards.into_iter().enumerate().filter(|(index, _)| part.takes(*index));
        let files: Vec<ShardFile> = numbered.map(|(_, file)| file).collect();
        let places = PathHash::of_all(&options.files, &files);
        let whole = self.file();
        let file = whole.part(part);
        let (mut known, mut hashes) = (vec![None; files.len()], vec![None; files.len()]);
        for earlier in [&file, &whole] {
            let saved = earlier.load(options.io).unwrap_or_else(|error| {
                warnings.push(format!("{}; it is made anew", error.report()));
                None
            });
            let records = known_records(&files, &places, saved.as_ref(), &options.files, pool);
            for (facts, record) in known.iter_mut().zip(records) {
                *facts = facts.or_else(|| Some(saved.as_ref()?.get(record?)?.1));
            }
            if self.checksums
                && let Some(saved) = earlier.checksums().load(options.io)?
            {
                add_hashes(&saved, &places, &known, &mut hashes);
            }
        }
        let stale: Vec<usize> =
            (0..files.len()).filter(|at| known[*at].is_none() || (self.checksums && hashes[*at].is_none())).collect();
        let (done, not_read) = (AtomicU64::new(0), NotRead::default());
        progress(0, stale.len() as u64);
        let open = |at: usize| {
            options.cancel.check()?;
            let at = stale[at];
            let opened = open_on(pool, &files[at].path, options)?;
            not_read.add(opened.shard(), options);
            let facts = opened.facts();
            if let Some(known) = known[at] {
                check_indexed(known, facts).map_err(|error| error.at(&files[at].path))?;
            }
            let hashes = if self.checksums { Some(opened.hashes()?) } else { None };
            progress(done.fetch_add(1, Ordering::Relaxed) + 1, stale.len() as u64);
            Ok((facts, hashes))
        };
        let mut faults = Vec::new();
        let opened = side_by_side(pool, stale.len(), open);
        for (at, result) in stale.iter().zip(opened) {
            match result {
                Ok((facts, found)) => (known[*at], hashes[*at]) = (Some(facts), found),
                Err(error) => faults.push(error),
            }
        }
        let described = files.iter().zip(&known).filter_map(|(file, facts)| Some((&*file.path, (*facts)?)));
        no_faults(faults, described, self.format, options)?;
        warnings.extend(not_read.warning());
        let facts: Vec<ShardFacts> = known.into_iter().flatten().collect();
        if self.checksums {
            let digests = places.iter().zip(&facts).map(|(place, facts)| index::digest(*place, facts));
            let shards: Vec<_> = digests.zip(hashes.into_iter().flatten()).collect();
            file.checksums().save(&shards)?;
        }
        file.save(places.into_iter().zip(facts.iter().copied()))?;
        Ok(IndexedPart { path: file.path().to_owned(), facts, opened: stale.len() as u64, warnings })
    }

    /// Joins the parts in the folder to the index of the corpus. Opens no shard.
    ///
    /// An index that is complete already needs no part, so that joining may run again.
    pub fn join(&self, pool: &rayon::ThreadPool) -> Result<Joined> {
        let Discovery { shards: files, .. } = discover::find(&self.options.files, self.data, self.format)?;
        let places = PathHash::of_all(&self.options.files, &files);
        let whole = self.file();
        let found = whole.parts()?;
        if !self.is_complete(&whole, &files, &places, pool) {
            self.join_into(&whole, &files, &places, &found)?;
        }
        let (corpus, indexed) = Corpus::index(self.data, self.format, self.options, self.folder, pool, &|_, _| ())?;
        let file = whole.checksums();
        let summed = match self.checksums {
            true => {
                let size_bytes = self.options.files.stat(file.path())?.stamp.size_bytes;
                Some(Summed { file, size_bytes, read: 0 })
            }
            false => None,
        };
        let mut parts = Vec::new();
        for (part, path) in found {
            parts.extend([path, whole.part(part).checksums().path().to_owned()]);
        }
        Ok(Joined { corpus, indexed, summed, parts })
    }

    /// Whether the saved index, with the checksums if they are asked for, describes all `files` as
    /// they are now.
    fn is_complete(
        &self,
        whole: &IndexFile,
        files: &[ShardFile],
        places: &[PathHash],
        pool: &rayon::ThreadPool,
    ) -> bool {
        let Ok(Some(saved)) = whole.load(self.options.io) else { return false };
        let known = known_records(files, places, Some(&saved), &self.options.files, pool);
        if known.len() != saved.len() || !is_in_order(&known) {
            return false;
        }
        if !self.checksums {
            return true;
        }
        let digests: Vec<u128> = (0..saved.len())
            .filter_map(|at| saved.get(at))
            .map(|(place, facts)| index::digest(place, &facts))
            .collect();
        let summed = whole.checksums().load(self.options.io);
        matches!(summed, Ok(Some(summed)) if summed.records(&digests).iter().all(Option::is_some))
    }

    fn join_into(
        &self,
        whole: &IndexFile,
        files: &[ShardFile],
        places: &[PathHash],
        found: &[(Part, PathBuf)],
    ) -> Result<()> {
        let count = complete_count(found, self.folder)?;
        let mut facts = vec![None; files.len()];
        let mut hashes = vec![None; files.len()];
        let (mut stale, mut unsummed) = (BTreeSet::new(), BTreeSet::new());
        let mut first_stale = None;
        for number in 0..count {
            let part = Part { count, number };
            let file = whole.part(part);
            let missing = || Error::new(ErrorKind::NotFound, format!("part {part} is missing")).at(file.path());
            let saved = file.load(self.options.io)?.ok_or_else(missing)?;
            let numbers: Vec<usize> = (0..files.len()).filter(|index| part.takes(*index)).collect();
            let mut current = vec![None; numbers.len()];
            for (at, index) in numbers.iter().enumerate() {
                current[at] = self.record_of(&saved, at, &files[*index], places[*index]);
            }
            let first = current.iter().position(Option::is_none).map(|at| numbers[at]);
            if first.is_some() || saved.len() != numbers.len() {
                stale.insert(part);
                first_stale = first_stale.or(first);
                continue;
            }
            if self.checksums {
                let own: Vec<PathHash> = numbers.iter().map(|index| places[*index]).collect();
                let mut found = vec![None; numbers.len()];
                if let Some(saved) = file.checksums().load(self.options.io)? {
                    add_hashes(&saved, &own, &current, &mut found);
                }
                if found.iter().any(Option::is_none) {
                    unsummed.insert(part);
                }
                numbers.iter().zip(found).for_each(|(index, found)| hashes[*index] = found);
            }
            numbers.iter().zip(current).for_each(|(index, found)| facts[*index] = found);
        }
        if !stale.is_empty() {
            let example = first_stale.map_or_else(String::new, |index| {
                format!(": `{}` is new, or changed since", files[index].path.display())
            });
            let text = format!("the shards are not as the parts found them{example}; run {} again", part_names(&stale));
            return Err(Error::new(ErrorKind::Changed, text).at(self.folder));
        }
        if !unsummed.is_empty() {
            let text =
                format!("no checksums are saved for {}: run them again with `--checksums`", part_names(&unsummed));
            return Err(Error::new(ErrorKind::NotFound, text).at(self.folder));
        }
        let facts: Vec<ShardFacts> = facts.into_iter().flatten().collect();
        let described = files.iter().zip(&facts).map(|(file, facts)| (&*file.path, *facts));
        no_faults(Vec::new(), described, self.format, self.options)?;
        if self.checksums {
            let digests = places.iter().zip(&facts).map(|(place, facts)| index::digest(*place, facts));
            let shards: Vec<_> = digests.zip(hashes.into_iter().flatten()).collect();
            whole.checksums().save(&shards)?;
        }
        whole.save(places.iter().copied().zip(facts))?;
        Ok(())
    }

    /// Record `at` of `saved`, if it describes `file` as it is now.
    fn record_of(&self, saved: &SavedIndex, at: usize, file: &ShardFile, place: PathHash) -> Option<ShardFacts> {
        if at >= saved.len() {
            return None;
        }
        let (found, facts) = saved.get(at)?;
        let files = &self.options.files;
        let stamp = format::stamp_with_beside(files, &file.path, files.stat(&file.path).ok()?.stamp).ok()?;
        (found == place && stamp == facts.stamp).then_some(facts)
    }
}

/// Takes from `saved` the checksums of the shards whose facts are `known` and that have none yet.
fn add_hashes(
    saved: &SavedChecksums,
    places: &[PathHash],
    known: &[Option<ShardFacts>],
    hashes: &mut [Option<Vec<u64>>],
) {
    for ((place, facts), hashes) in places.iter().zip(known).zip(hashes) {
        let Some(facts) = facts else { continue };
        if hashes.is_none() {
            let record = saved.records(&[index::digest(*place, facts)])[0];
            *hashes = record.map(|record| saved.hashes(record));
        }
    }
}

/// The number of parts, if `found` holds all parts of one number. Fails with the names of those
/// that are missing or doubled.
pub fn complete_count(found: &[(Part, PathBuf)], folder: &Path) -> Result<u32> {
    let Some((first, path)) = found.first() else {
        let text = "no part is saved here: run `--part 0/N` to `--part N-1/N` with the same data and settings";
        return Err(Error::new(ErrorKind::NotFound, text).at(folder));
    };
    if let Some((other, there)) = found.iter().find(|(part, _)| part.count() != first.count()) {
        return Err(Error::data(format!(
            "work was shared out twice, as {first} in `{}` and as {other} in `{}`: remove the parts of one of them",
            path.display(),
            there.display()
        ))
        .at(folder));
    }
    let there: BTreeSet<Part> = found.iter().map(|(part, _)| *part).collect();
    let all = (0..first.count).map(|number| Part { count: first.count, number });
    let missing: BTreeSet<Part> = all.filter(|part| !there.contains(part)).collect();
    if missing.is_empty() {
        return Ok(first.count);
    }
    let text = format!("parts are missing: run {} (`--part I/{}`)", part_names(&missing), first.count);
    Err(Error::new(ErrorKind::NotFound, text).at(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_written_as_its_number_and_the_count() {
        for (text, part) in [("0/1", Part::WHOLE), ("63/64", Part { count: 64, number: 63 })] {
            assert_eq!(text.parse(), Ok(part));
            assert_eq!(part.to_string(), text);
        }
        for text in ["", "1", "1/1", "0/0", "-1/2", "1/2/3", "a/2", "0/4294967296"] {
            assert!(text.parse::<Part>().is_err(), "{text}");
        }
    }

    #[test]
    fn every_piece_belongs_to_one_part() {
        for count in [1, 3, 64] {
            for index in 0..200 {
                let taken: Vec<Part> =
                    (0..count).map(|number| Part { count, number }).filter(|part| part.takes(index)).collect();
                assert_eq!(taken, [Part::of(index, count)]);
            }
        }
    }
}
