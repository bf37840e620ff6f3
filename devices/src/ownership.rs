//! Who owns an HBM partition: one table of edges, and nothing else decides.
//!
//! An [`Event`] is a command or an incident with its circumstances already judged (was the token right, is the
//! device booted). [`edge`] gives, for every state and event, the next state, what has to be done, and the
//! result that the driver sees. Tokens live in [`Machine`] only and are never shown.

use std::collections::VecDeque;

pub use numagpu_spec::regs::OwnerEvent as Event;
use numagpu_spec::regs::{OwnerLoss, OwnerResult, OwnerState};

use crate::state::{RestoreError, SavedPartition};

/// Steps that a partition remembers for a post-mortem.
pub const HISTORY: usize = 32;

/// What an edge asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// The commanding token becomes the owner; the generation grows.
    Own,
    /// The new token becomes the owner.
    HandOver,
    /// The owner's lease begins anew.
    Renew,
    /// There is no owner any more, and the scrubber has to run.
    Scrub,
    /// The generation grows; an owner that lost the partition is told.
    Free,
}

/// Where an event leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edge {
    /// State after it.
    pub next: OwnerState,
    /// What has to be done.
    pub action: Action,
    /// What `PARTITION.RESULT` shows, `None` if the event was no command.
    pub result: Option<OwnerResult>,
}

/// The table of edges.
pub const fn edge(state: OwnerState, event: Event) -> Edge {
    use Action::{Free, HandOver, Nothing, Own, Renew, Scrub};
    use Event as E;
    use OwnerResult as R;
    use OwnerState as S;
    let (next, action, result) = match (state, event) {
        (_, E::BadCommand) => (state, Nothing, Some(R::BadCommand)),

        (S::Free, E::Claim) => (S::Claimed, Own, Some(R::Ok)),
        (S::Free, E::ClaimBadToken) => (S::Free, Nothing, Some(R::BadToken)),
        (S::Free, E::ClaimNotReady) => (S::Free, Nothing, Some(R::NotReady)),
        (S::Free, E::ClaimNotCoherent) => (S::Free, Nothing, Some(R::NotCoherent)),
        (
            S::Free,
            E::Release
            | E::ReleaseByOther
            | E::Transfer
            | E::TransferByOther
            | E::TransferBadToken
            | E::Renew
            | E::RenewByOther,
        ) => (S::Free, Nothing, Some(R::NotOwner)),
        // What is free holds zeros as far as engines go, but the guest's CPUs reach it all the time: the next
        // VMM must not find their data.
        // The same where the borders of partitions move: what is free now was another partition's.
        (S::Free, E::Disconnect | E::PartitionChange) => (S::Releasing, Scrub, None),
        (
            S::Free,
            E::FunctionReset
            | E::HotReset
            | E::BusMasterOff
            | E::LeaseExpired
            | E::Scrubbed
            | E::ScrubFailed
            | E::Kept,
        ) => (S::Free, Nothing, None),

        (S::Claimed, E::Claim | E::ClaimNotReady | E::ClaimNotCoherent) => {
            (S::Claimed, Nothing, Some(R::Busy))
        }
        (S::Claimed, E::ClaimBadToken | E::TransferBadToken) => {
            (S::Claimed, Nothing, Some(R::BadToken))
        }
        (S::Claimed, E::Release) => (S::Releasing, Scrub, Some(R::Ok)),
        (S::Claimed, E::Transfer) => (S::Claimed, HandOver, Some(R::Ok)),
        (S::Claimed, E::Renew) => (S::Claimed, Renew, Some(R::Ok)),
        (S::Claimed, E::ReleaseByOther | E::TransferByOther | E::RenewByOther) => {
            (S::Claimed, Nothing, Some(R::NotOwner))
        }
        (
            S::Claimed,
            E::FunctionReset
            | E::HotReset
            | E::BusMasterOff
            | E::LeaseExpired
            | E::PartitionChange
            | E::Disconnect,
        ) => (S::Releasing, Scrub, None),
        (S::Claimed, E::Scrubbed | E::ScrubFailed | E::Kept) => (S::Claimed, Nothing, None),

        (
            S::Releasing,
            E::Claim
            | E::ClaimBadToken
            | E::ClaimNotReady
            | E::ClaimNotCoherent
            | E::Release
            | E::ReleaseByOther
            | E::Transfer
            | E::TransferByOther
            | E::TransferBadToken
            | E::Renew
            | E::RenewByOther,
        ) => (S::Releasing, Nothing, Some(R::Releasing)),
        // The scrub that is under way serves: nobody owned the partition since it began.
        (S::Releasing, E::FunctionReset | E::HotReset | E::BusMasterOff | E::LeaseExpired) => {
            (S::Releasing, Nothing, None)
        }
        // Not so for a disconnect: until then CPUs could write behind the scrubber. It runs once more. Nor where
        // borders move: others may have owned the memory since.
        (S::Releasing, E::Disconnect | E::PartitionChange) => (S::Releasing, Scrub, None),
        (S::Releasing, E::Scrubbed | E::Kept) => (S::Free, Free, None),
        (S::Releasing, E::ScrubFailed) => (S::Faulted, Nothing, None),

        (
            S::Faulted,
            E::Claim
            | E::ClaimBadToken
            | E::ClaimNotReady
            | E::ClaimNotCoherent
            | E::Release
            | E::ReleaseByOther
            | E::Transfer
            | E::TransferByOther
            | E::TransferBadToken
            | E::Renew
            | E::RenewByOther,
        ) => (S::Faulted, Nothing, Some(R::Faulted)),
        (S::Faulted, E::FunctionReset | E::HotReset | E::PartitionChange | E::Disconnect) => {
            (S::Releasing, Scrub, None)
        }
        (
            S::Faulted,
            E::BusMasterOff | E::LeaseExpired | E::Scrubbed | E::ScrubFailed | E::Kept,
        ) => (S::Faulted, Nothing, None),
    };
    Edge {
        next,
        action,
        result,
    }
}

/// Why an owner loses the partition by an event that it did not ask for.
const fn loss(event: Event) -> Option<OwnerLoss> {
    match event {
        Event::FunctionReset => Some(OwnerLoss::FunctionReset),
        Event::HotReset => Some(OwnerLoss::HotReset),
        Event::BusMasterOff => Some(OwnerLoss::BusMasterOff),
        Event::LeaseExpired => Some(OwnerLoss::LeaseExpired),
        Event::PartitionChange => Some(OwnerLoss::PartitionChange),
        Event::Disconnect => Some(OwnerLoss::Disconnect),
        _ => None,
    }
}

/// End of a lease that has none, in nanoseconds.
pub const ENDLESS: u64 = u64::MAX;

/// End of a lease of `ms` milliseconds, 0 for one without end, that begins at `now_ns`.
const fn lease_end(ms: u32, now_ns: u64) -> u64 {
    match ms {
        0 => ENDLESS,
        ms => now_ns.saturating_add(ms as u64 * 1_000_000),
    }
}

/// One remembered step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// Device clock in nanoseconds.
    pub at_ns: u64,
    /// State before.
    pub from: OwnerState,
    /// What happened.
    pub event: Event,
    /// State after.
    pub to: OwnerState,
}

/// The ownership of one partition.
#[derive(Clone, Debug)]
pub struct Machine {
    state: OwnerState,
    /// The owner's token; 0 unless claimed.
    owner: u64,
    generation: u32,
    result: OwnerResult,
    /// When the owner's lease ends; 0 without an owner.
    lease_end: u64,
    loss: OwnerLoss,
    /// Whether an owner that still runs lost the partition to the scrub under way.
    lost: bool,
    /// Scrubs asked for and not yet done; only the last one frees.
    scrubs: u32,
    /// Whether none of them clears: each was asked for by a disconnect that keeps contents.
    keeping: bool,
    history: VecDeque<Step>,
}

/// Circumstances of a driver's command.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    /// `PARTITION.TOKEN`.
    pub token: u64,
    /// `PARTITION.NEW_TOKEN`.
    pub new_token: u64,
    /// `PARTITION.LEASE_MS`.
    pub lease_ms: u32,
    /// Whether `BOOT.STATUS` is READY.
    pub ready: bool,
    /// Whether the partition is coherently attached, or in an aperture.
    pub coherent: bool,
}

/// What becomes of HBM when the VMM goes away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnDisconnect {
    /// All of it is scrubbed: the next VMM finds zeros.
    #[default]
    Scrub,
    /// It has no owner any more, but what was in it stays. The next VMM, whoever that is, reads it.
    Keep,
}

/// What the caller has to do after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Nothing.
    Nothing,
    /// Give the partition to the scrubber; it has no owner now.
    Scrub,
    /// The same, but the scrubber leaves its contents as they are and says [`Event::Kept`].
    Keep,
    /// Raise the OWNERSHIP interrupt.
    Notify,
}

impl Machine {
    /// A free partition.
    pub fn new() -> Machine {
        Machine {
            state: OwnerState::Free,
            owner: 0,
            generation: 0,
            result: OwnerResult::None,
            lease_end: 0,
            loss: OwnerLoss::None,
            lost: false,
            scrubs: 0,
            keeping: false,
            history: VecDeque::with_capacity(HISTORY),
        }
    }

    /// State now.
    pub fn state(&self) -> OwnerState {
        self.state
    }

    /// The owner's token for the engines' check, 0 if there is none. Not for registers or logs.
    pub(crate) fn owner(&self) -> u64 {
        self.owner
    }

    /// Claims and frees so far.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Result of the last command since reset.
    pub fn result(&self) -> OwnerResult {
        self.result
    }

    /// When the owner's lease ends in nanoseconds, [`ENDLESS`] if it does not; 0 if there is no owner.
    pub fn lease_end(&self) -> u64 {
        self.lease_end
    }

    /// Why an owner last lost the partition without asking.
    pub fn loss(&self) -> OwnerLoss {
        self.loss
    }

    /// The last steps, oldest first, at most [`HISTORY`].
    pub fn history(&self) -> impl DoubleEndedIterator<Item = &Step> + ExactSizeIterator {
        self.history.iter()
    }

    /// A driver's command.
    pub fn command(&mut self, command: u32, with: Circumstances, now_ns: u64) -> Duty {
        use numagpu_spec::regs::OwnerCommand;
        let is_owner = self.owner != 0 && with.token == self.owner;
        let event = match OwnerCommand::from_code(command) {
            None => Event::BadCommand,
            Some(OwnerCommand::Claim) => match with {
                Circumstances { token: 0, .. } => Event::ClaimBadToken,
                Circumstances { ready: false, .. } => Event::ClaimNotReady,
                Circumstances {
                    coherent: false, ..
                } => Event::ClaimNotCoherent,
                _ => Event::Claim,
            },
            Some(OwnerCommand::Release) if is_owner => Event::Release,
            Some(OwnerCommand::Release) => Event::ReleaseByOther,
            Some(OwnerCommand::Transfer) if !is_owner => Event::TransferByOther,
            Some(OwnerCommand::Transfer) if with.new_token == 0 => Event::TransferBadToken,
            Some(OwnerCommand::Transfer) => Event::Transfer,
            Some(OwnerCommand::Renew) if is_owner => Event::Renew,
            Some(OwnerCommand::Renew) => Event::RenewByOther,
        };
        self.step(event, Some(&with), now_ns)
    }

    /// Ends a lease that is over at `now_ns`.
    pub fn expire(&mut self, now_ns: u64) -> Duty {
        if self.state == OwnerState::Claimed && now_ns >= self.lease_end {
            return self.incident(Event::LeaseExpired, now_ns);
        }
        Duty::Nothing
    }

    /// An incident that no driver asked for.
    pub fn incident(&mut self, event: Event, now_ns: u64) -> Duty {
        self.step(event, None, now_ns)
    }

    /// The VMM went away. [`OnDisconnect::Keep`] holds for what an owner had and for what was free. What is being
    /// scrubbed, or could not be, is scrubbed all the same: its last owner was promised that.
    pub fn disconnect(&mut self, contents: OnDisconnect, now_ns: u64) -> Duty {
        let again = self.keeping && self.scrubs > 0;
        let whole = matches!(self.state, OwnerState::Claimed | OwnerState::Free);
        let duty = self.incident(Event::Disconnect, now_ns);
        self.keeping = contents == OnDisconnect::Keep && (whole || again);
        match duty {
            Duty::Scrub if self.keeping && again => {
                // The one under way serves this time too. A second could take the place of one that clears.
                self.scrubs = self.scrubs.saturating_sub(1);
                Duty::Nothing
            }
            Duty::Scrub if self.keeping => Duty::Keep,
            other => other,
        }
    }

    fn step(&mut self, event: Event, with: Option<&Circumstances>, now_ns: u64) -> Duty {
        if matches!(event, Event::Scrubbed | Event::ScrubFailed | Event::Kept) {
            self.scrubs = self.scrubs.saturating_sub(1);
            if self.scrubs > 0 {
                // A later scrub was asked for and decides.
                return Duty::Nothing;
            }
        }
        let from = self.state;
        let taken = edge(from, event);
        self.state = taken.next;
        if let Some(result) = taken.result {
            self.result = result;
        }
        match event {
            Event::FunctionReset | Event::HotReset | Event::PartitionChange | Event::Disconnect => {
                self.result = OwnerResult::None
            }
            _ => {}
        }
        if let Some(loss) = loss(event)
            && from == OwnerState::Claimed
        {
            self.loss = loss;
            self.lost = true;
        }
        if event == Event::Disconnect {
            // Nobody is left to be told.
            self.lost = false;
        }
        if from != taken.next || taken.action != Action::Nothing {
            if self.history.len() == HISTORY {
                self.history.pop_front();
            }
            self.history.push_back(Step {
                at_ns: now_ns,
                from,
                event,
                to: taken.next,
            });
        }
        let (token, new_token, lease_ms) = with.map_or((0, 0, 0), |with| {
            (with.token, with.new_token, with.lease_ms)
        });
        match taken.action {
            Action::Nothing => Duty::Nothing,
            Action::Own => {
                self.owner = token;
                self.generation = self.generation.wrapping_add(1);
                self.lease_end = lease_end(lease_ms, now_ns);
                Duty::Nothing
            }
            Action::HandOver => {
                self.owner = new_token;
                self.lease_end = lease_end(lease_ms, now_ns);
                Duty::Nothing
            }
            Action::Renew => {
                self.lease_end = lease_end(lease_ms, now_ns);
                Duty::Nothing
            }
            Action::Scrub => {
                self.owner = 0;
                self.lease_end = 0;
                self.keeping = false;
                if self.scrubs >= 2 {
                    // One scrub is at work and one has not begun: the latter serves this time too.
                    return Duty::Nothing;
                }
                self.scrubs += 1;
                Duty::Scrub
            }
            Action::Free => {
                self.generation = self.generation.wrapping_add(1);
                if std::mem::take(&mut self.lost) {
                    Duty::Notify
                } else {
                    Duty::Nothing
                }
            }
        }
    }
}

impl Machine {
    /// All of it but how many scrubs are under way and whether they clear, and `fail_scrub`, which it does not know.
    pub(crate) fn save(&self) -> SavedPartition {
        let Machine {
            state,
            owner,
            generation,
            result,
            lease_end,
            loss,
            lost,
            scrubs: _,
            keeping: _,
            history,
        } = self;
        let step = |step: &Step| {
            let (from, to) = (step.from.code(), step.to.code());
            (step.at_ns, from, step.event.code(), to)
        };
        SavedPartition {
            state: state.code(),
            owner: *owner,
            generation: *generation,
            result: result.code(),
            lease_end: *lease_end,
            loss: loss.code(),
            lost: *lost,
            fail_scrub: false,
            history: history.iter().map(step).collect(),
        }
    }

    /// The machine that was saved, as the number `index` of its GPU. If it is RELEASING one scrub is asked for.
    ///
    /// # Errors
    /// [`RestoreError::Bad`] for what no machine gets to.
    pub(crate) fn restored(saved: &SavedPartition, index: usize) -> Result<Machine, RestoreError> {
        let bad = |what, value: u64| RestoreError::Bad { what, index, value };
        let code = |what, code: u32| move || bad(what, code.into());
        let state = OwnerState::from_code(saved.state);
        let state = state.ok_or_else(code("state of partition", saved.state))?;
        let result = OwnerResult::from_code(saved.result);
        let result = result.ok_or_else(code("result of partition", saved.result))?;
        let loss = OwnerLoss::from_code(saved.loss);
        let loss = loss.ok_or_else(code("loss of partition", saved.loss))?;
        let is_claimed = state == OwnerState::Claimed;
        if (saved.owner != 0) != is_claimed {
            // Not the value: it is a secret.
            return Err(bad(
                "state, for its owner, of partition",
                saved.state.into(),
            ));
        }
        if (saved.lease_end != 0) != is_claimed {
            return Err(bad("lease of partition", saved.lease_end));
        }
        if saved.lost && !matches!(state, OwnerState::Releasing | OwnerState::Faulted) {
            return Err(bad("pending loss of partition", 1));
        }
        let steps = saved.history.len();
        if steps > HISTORY {
            return Err(bad("length of the history of partition", steps as u64));
        }
        let mut history = VecDeque::with_capacity(HISTORY);
        for (at_ns, from, event, to) in saved.history.iter().copied() {
            let what = "step of partition";
            history.push_back(Step {
                at_ns,
                from: OwnerState::from_code(from).ok_or_else(code(what, from))?,
                event: Event::from_code(event).ok_or_else(code(what, event))?,
                to: OwnerState::from_code(to).ok_or_else(code(what, to))?,
            });
        }
        Ok(Machine {
            state,
            owner: saved.owner,
            generation: saved.generation,
            result,
            lease_end: saved.lease_end,
            loss,
            lost: saved.lost,
            scrubs: u32::from(state == OwnerState::Releasing),
            keeping: false,
            history,
        })
    }
}

impl Default for Machine {
    fn default() -> Machine {
        Machine::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The table again, as rows of (next, action, result) for each state in the order of [`Event::ALL`], so that
    /// no edge changes unnoticed.
    #[test]
    fn the_full_product_of_states_and_events() {
        use Action::{Free as Freed, HandOver, Nothing as No, Own, Renew, Scrub};
        use OwnerResult as R;
        use OwnerState::{Claimed, Faulted, Free, Releasing};
        let refuse = |state, result| (state, No, Some(result));
        let ignore = |state| (state, No, None);
        let rows = [
            (
                Free,
                [
                    (Claimed, Own, Some(R::Ok)),
                    refuse(Free, R::BadToken),
                    refuse(Free, R::NotReady),
                    refuse(Free, R::NotCoherent),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::NotOwner),
                    refuse(Free, R::BadCommand),
                    ignore(Free),
                    ignore(Free),
                    ignore(Free),
                    ignore(Free),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    ignore(Free),
                    ignore(Free),
                    ignore(Free),
                ],
            ),
            (
                Claimed,
                [
                    refuse(Claimed, R::Busy),
                    refuse(Claimed, R::BadToken),
                    refuse(Claimed, R::Busy),
                    refuse(Claimed, R::Busy),
                    (Releasing, Scrub, Some(R::Ok)),
                    refuse(Claimed, R::NotOwner),
                    (Claimed, HandOver, Some(R::Ok)),
                    refuse(Claimed, R::NotOwner),
                    refuse(Claimed, R::BadToken),
                    (Claimed, Renew, Some(R::Ok)),
                    refuse(Claimed, R::NotOwner),
                    refuse(Claimed, R::BadCommand),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    ignore(Claimed),
                    ignore(Claimed),
                    ignore(Claimed),
                ],
            ),
            (
                Releasing,
                [
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::Releasing),
                    refuse(Releasing, R::BadCommand),
                    ignore(Releasing),
                    ignore(Releasing),
                    ignore(Releasing),
                    ignore(Releasing),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    (Free, Freed, None),
                    ignore(Faulted),
                    (Free, Freed, None),
                ],
            ),
            (
                Faulted,
                [
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::Faulted),
                    refuse(Faulted, R::BadCommand),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    ignore(Faulted),
                    ignore(Faulted),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
                    ignore(Faulted),
                    ignore(Faulted),
                    ignore(Faulted),
                ],
            ),
        ];
        assert_eq!(rows.len(), OwnerState::ALL.len());
        for (state, row) in rows {
            assert_eq!(row.len(), Event::ALL.len());
            for (event, (next, action, result)) in Event::ALL.iter().zip(row) {
                let expected = Edge {
                    next,
                    action,
                    result,
                };
                assert_eq!(edge(state, *event), expected, "{state:?} x {event:?}");
            }
        }
    }

    #[test]
    fn no_edge_leaves_an_owner_without_a_claim() {
        for state in OwnerState::ALL {
            for event in Event::ALL {
                let edge = edge(*state, *event);
                if edge.next == OwnerState::Claimed {
                    assert!(*state == OwnerState::Claimed || edge.action == Action::Own);
                }
                if *state == OwnerState::Claimed && edge.next != OwnerState::Claimed {
                    assert_eq!(edge.action, Action::Scrub);
                }
            }
        }
    }

    const GOOD: Circumstances = Circumstances {
        token: 7,
        new_token: 9,
        lease_ms: 0,
        ready: true,
        coherent: true,
    };
    const CLAIM: u32 = 1;
    const RELEASE: u32 = 2;
    const TRANSFER: u32 = 3;
    const RENEW: u32 = 4;
    const MS: u64 = 1_000_000;

    #[test]
    fn a_life() {
        let mut machine = Machine::new();
        assert_eq!(machine.command(CLAIM, GOOD, 1), Duty::Nothing);
        assert_eq!((machine.owner(), machine.generation()), (7, 1));
        machine.command(CLAIM, GOOD, 2);
        assert_eq!(machine.result(), OwnerResult::Busy);
        machine.command(TRANSFER, GOOD, 3);
        assert_eq!((machine.owner(), machine.generation()), (9, 1));
        machine.command(RELEASE, GOOD, 4);
        assert_eq!(machine.result(), OwnerResult::NotOwner);
        let owner = Circumstances { token: 9, ..GOOD };
        assert_eq!(machine.command(RELEASE, owner, 5), Duty::Scrub);
        assert_eq!(machine.owner(), 0);
        machine.command(CLAIM, GOOD, 6);
        assert_eq!(machine.result(), OwnerResult::Releasing);
        assert_eq!(machine.incident(Event::Scrubbed, 7), Duty::Nothing);
        assert_eq!(
            (machine.state(), machine.generation()),
            (OwnerState::Free, 2)
        );
        assert_eq!(machine.history().count(), 4);
    }

    #[test]
    fn a_loss_is_told_and_a_release_is_not() {
        let mut machine = Machine::new();
        machine.command(CLAIM, GOOD, 0);
        assert_eq!(machine.incident(Event::FunctionReset, 1), Duty::Scrub);
        assert_eq!(machine.incident(Event::Scrubbed, 2), Duty::Notify);
        machine.command(CLAIM, GOOD, 3);
        assert_eq!(machine.incident(Event::Disconnect, 4), Duty::Scrub);
        assert_eq!(machine.incident(Event::Scrubbed, 5), Duty::Nothing);
    }

    #[test]
    fn a_lease_ends_unless_it_is_renewed() {
        let mut machine = Machine::new();
        let with = Circumstances {
            lease_ms: 5,
            ..GOOD
        };
        machine.command(CLAIM, with, MS);
        assert_eq!(machine.lease_end(), 6 * MS);
        assert_eq!(machine.expire(6 * MS - 1), Duty::Nothing);
        machine.command(RENEW, Circumstances { token: 8, ..with }, 4 * MS);
        assert_eq!(machine.result(), OwnerResult::NotOwner);
        machine.command(RENEW, with, 4 * MS);
        assert_eq!(machine.lease_end(), 9 * MS);
        machine.command(TRANSFER, with, 8 * MS);
        assert_eq!(machine.lease_end(), 13 * MS, "the next owner's begins anew");
        assert_eq!(machine.expire(13 * MS), Duty::Scrub);
        assert_eq!(machine.loss(), OwnerLoss::LeaseExpired);
        assert_eq!((machine.owner(), machine.lease_end()), (0, 0));
        assert_eq!(machine.expire(14 * MS), Duty::Nothing);
        assert_eq!(machine.incident(Event::Scrubbed, 15 * MS), Duty::Notify);
        machine.command(CLAIM, GOOD, 16 * MS);
        assert_eq!(machine.expire(u64::MAX - 1), Duty::Nothing, "without end");
    }

    #[test]
    fn every_loss_has_its_reason() {
        let losses = [
            (Event::FunctionReset, OwnerLoss::FunctionReset),
            (Event::HotReset, OwnerLoss::HotReset),
            (Event::BusMasterOff, OwnerLoss::BusMasterOff),
            (Event::LeaseExpired, OwnerLoss::LeaseExpired),
            (Event::PartitionChange, OwnerLoss::PartitionChange),
            (Event::Disconnect, OwnerLoss::Disconnect),
        ];
        assert_eq!(losses.len() + 1, OwnerLoss::ALL.len());
        for (event, loss) in losses {
            let mut machine = Machine::new();
            machine.incident(event, 0);
            assert_eq!(machine.loss(), OwnerLoss::None, "it had no owner");
            machine = Machine::new();
            machine.command(CLAIM, GOOD, 0);
            machine.incident(event, 0);
            assert_eq!(machine.loss(), loss);
        }
    }

    #[test]
    fn only_the_last_scrub_frees() {
        let mut machine = Machine::new();
        machine.command(CLAIM, GOOD, 0);
        assert_eq!(machine.command(RELEASE, GOOD, 1), Duty::Scrub);
        assert_eq!(machine.incident(Event::Disconnect, 2), Duty::Scrub);
        assert_eq!(machine.incident(Event::Disconnect, 3), Duty::Nothing);
        machine.incident(Event::Scrubbed, 4);
        assert_eq!(machine.state(), OwnerState::Releasing);
        machine.incident(Event::Scrubbed, 5);
        assert_eq!(machine.state(), OwnerState::Free);
    }

    #[test]
    fn a_disconnect_keeps_only_what_was_whole() {
        let keep = |machine: &mut Machine| machine.disconnect(OnDisconnect::Keep, 1);
        let mut machine = Machine::new();
        assert_eq!(keep(&mut machine), Duty::Keep, "free");
        assert_eq!(machine.incident(Event::Kept, 2), Duty::Nothing);
        machine.command(CLAIM, GOOD, 0);
        assert_eq!(keep(&mut machine), Duty::Keep, "claimed");
        assert_eq!(
            (machine.owner(), machine.loss()),
            (0, OwnerLoss::Disconnect)
        );
        // The next VMM comes and goes before the scrubber looks.
        assert_eq!(keep(&mut machine), Duty::Nothing);
        machine.incident(Event::Kept, 3);
        assert_eq!(machine.state(), OwnerState::Free);

        // What its owner gave up was promised to be zeros.
        machine.command(CLAIM, GOOD, 0);
        assert_eq!(machine.command(RELEASE, GOOD, 1), Duty::Scrub);
        assert_eq!(keep(&mut machine), Duty::Scrub, "releasing");
        machine.incident(Event::Scrubbed, 4);
        machine.incident(Event::ScrubFailed, 5);
        assert_eq!(machine.state(), OwnerState::Faulted);
        assert_eq!(keep(&mut machine), Duty::Scrub, "faulted");
        machine.incident(Event::Scrubbed, 6);

        // Another partition's memory is cleared though a disconnect keeps its own.
        assert_eq!(keep(&mut machine), Duty::Keep);
        assert_eq!(machine.incident(Event::PartitionChange, 7), Duty::Scrub);
        assert_eq!(
            keep(&mut machine),
            Duty::Nothing,
            "the one that clears serves"
        );
        machine.incident(Event::Kept, 8);
        assert_eq!(machine.state(), OwnerState::Releasing);
        machine.incident(Event::Scrubbed, 9);
        assert_eq!(machine.state(), OwnerState::Free);

        let mut scrubbing = Machine::new();
        assert_eq!(scrubbing.disconnect(OnDisconnect::Scrub, 1), Duty::Scrub);
    }

    #[test]
    fn history_is_bounded() {
        let mut machine = Machine::new();
        for at in 0..1000 {
            machine.command(CLAIM, GOOD, at);
            machine.command(RELEASE, GOOD, at);
            machine.incident(Event::Scrubbed, at);
        }
        assert_eq!(machine.history().count(), HISTORY);
        assert_eq!(machine.history().last().map(|step| step.at_ns), Some(999));
    }

    #[test]
    fn circumstances_are_judged_in_order() {
        let mut machine = Machine::new();
        let mut with = Circumstances {
            token: 0,
            new_token: 0,
            lease_ms: 0,
            ready: false,
            coherent: false,
        };
        machine.command(CLAIM, with, 0);
        assert_eq!(machine.result(), OwnerResult::BadToken);
        with.token = 1;
        machine.command(CLAIM, with, 0);
        assert_eq!(machine.result(), OwnerResult::NotReady);
        with.ready = true;
        machine.command(CLAIM, with, 0);
        assert_eq!(machine.result(), OwnerResult::NotCoherent);
        machine.command(77, with, 0);
        assert_eq!(machine.result(), OwnerResult::BadCommand);
        // Token 0 is nobody's, not even a free partition's.
        with.token = 0;
        machine.command(RELEASE, with, 0);
        assert_eq!(machine.result(), OwnerResult::NotOwner);
    }
}
