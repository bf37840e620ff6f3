//! Who owns an HBM partition: one table of edges, and nothing else decides.
//!
//! An [`Event`] is a command or an incident with its circumstances already judged (was the token right, is the
//! device booted). [`edge`] gives, for every state and event, the next state, what has to be done, and the
//! result that the driver sees. Tokens live in [`Machine`] only and are never shown.

use std::collections::VecDeque;

use numagpu_spec::regs::{OwnerResult, OwnerState};

/// Steps that a partition remembers for a post-mortem.
pub const HISTORY: usize = 32;

/// What happens to a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// CLAIM with a token, while booted and coherent.
    Claim,
    /// CLAIM with token 0.
    ClaimBadToken,
    /// CLAIM before the boot is over.
    ClaimNotReady,
    /// CLAIM while the VMM does not map this HBM where the plan says.
    ClaimNotCoherent,
    /// RELEASE with the owner's token.
    Release,
    /// RELEASE with another token.
    ReleaseByOther,
    /// TRANSFER with the owner's token, to a token.
    Transfer,
    /// TRANSFER with another token.
    TransferByOther,
    /// TRANSFER with the owner's token, to token 0.
    TransferBadToken,
    /// A command that does not exist.
    BadCommand,
    /// The function was reset.
    FunctionReset,
    /// The VMM went away.
    Disconnect,
    /// The scrubber is done.
    Scrubbed,
    /// The scrubber failed.
    ScrubFailed,
}

impl Event {
    /// Every event.
    pub const ALL: &'static [Event] = &[
        Event::Claim,
        Event::ClaimBadToken,
        Event::ClaimNotReady,
        Event::ClaimNotCoherent,
        Event::Release,
        Event::ReleaseByOther,
        Event::Transfer,
        Event::TransferByOther,
        Event::TransferBadToken,
        Event::BadCommand,
        Event::FunctionReset,
        Event::Disconnect,
        Event::Scrubbed,
        Event::ScrubFailed,
    ];
}

/// What an edge asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Nothing.
    Nothing,
    /// The commanding token becomes the owner; the generation grows.
    Own,
    /// The new token becomes the owner.
    HandOver,
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
    use Action::{Free, HandOver, Nothing, Own, Scrub};
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
            E::Release | E::ReleaseByOther | E::Transfer | E::TransferByOther | E::TransferBadToken,
        ) => (S::Free, Nothing, Some(R::NotOwner)),
        // What is free holds zeros as far as engines go, but the guest's CPUs reach it all the time: the next
        // VMM must not find their data.
        (S::Free, E::Disconnect) => (S::Releasing, Scrub, None),
        (S::Free, E::FunctionReset | E::Scrubbed | E::ScrubFailed) => (S::Free, Nothing, None),

        (S::Claimed, E::Claim | E::ClaimNotReady | E::ClaimNotCoherent) => {
            (S::Claimed, Nothing, Some(R::Busy))
        }
        (S::Claimed, E::ClaimBadToken | E::TransferBadToken) => {
            (S::Claimed, Nothing, Some(R::BadToken))
        }
        (S::Claimed, E::Release) => (S::Releasing, Scrub, Some(R::Ok)),
        (S::Claimed, E::Transfer) => (S::Claimed, HandOver, Some(R::Ok)),
        (S::Claimed, E::ReleaseByOther | E::TransferByOther) => {
            (S::Claimed, Nothing, Some(R::NotOwner))
        }
        (S::Claimed, E::FunctionReset | E::Disconnect) => (S::Releasing, Scrub, None),
        (S::Claimed, E::Scrubbed | E::ScrubFailed) => (S::Claimed, Nothing, None),

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
            | E::TransferBadToken,
        ) => (S::Releasing, Nothing, Some(R::Releasing)),
        // The scrub that is under way serves: nobody owned the partition since it began.
        (S::Releasing, E::FunctionReset) => (S::Releasing, Nothing, None),
        // Not so for a disconnect: until then CPUs could write behind the scrubber. It runs once more.
        (S::Releasing, E::Disconnect) => (S::Releasing, Scrub, None),
        (S::Releasing, E::Scrubbed) => (S::Free, Free, None),
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
            | E::TransferBadToken,
        ) => (S::Faulted, Nothing, Some(R::Faulted)),
        (S::Faulted, E::FunctionReset | E::Disconnect) => (S::Releasing, Scrub, None),
        (S::Faulted, E::Scrubbed | E::ScrubFailed) => (S::Faulted, Nothing, None),
    };
    Edge {
        next,
        action,
        result,
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
    /// Whether an owner that still runs lost the partition to the scrub under way.
    lost: bool,
    /// Scrubs asked for and not yet done; only the last one frees.
    scrubs: u32,
    history: VecDeque<Step>,
}

/// Circumstances of a driver's command.
#[derive(Clone, Copy, Debug)]
pub struct Circumstances {
    /// `PARTITION.TOKEN`.
    pub token: u64,
    /// `PARTITION.NEW_TOKEN`.
    pub new_token: u64,
    /// Whether `BOOT.STATUS` is READY.
    pub ready: bool,
    /// Whether the partition is coherently attached, or in an aperture.
    pub coherent: bool,
}

/// What the caller has to do after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// Nothing.
    Nothing,
    /// Give the partition to the scrubber.
    Scrub,
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
            lost: false,
            scrubs: 0,
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

    /// The last steps, oldest first, at most [`HISTORY`].
    pub fn history(&self) -> impl Iterator<Item = &Step> {
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
        };
        self.step(event, with.token, with.new_token, now_ns)
    }

    /// An incident that no driver asked for.
    pub fn incident(&mut self, event: Event, now_ns: u64) -> Duty {
        self.step(event, 0, 0, now_ns)
    }

    fn step(&mut self, event: Event, token: u64, new_token: u64, now_ns: u64) -> Duty {
        if matches!(event, Event::Scrubbed | Event::ScrubFailed) {
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
            Event::FunctionReset => {
                self.result = OwnerResult::None;
                self.lost |= from == OwnerState::Claimed;
            }
            Event::Disconnect => {
                self.result = OwnerResult::None;
                self.lost = false;
            }
            _ => {}
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
        match taken.action {
            Action::Nothing => Duty::Nothing,
            Action::Own => {
                self.owner = token;
                self.generation = self.generation.wrapping_add(1);
                Duty::Nothing
            }
            Action::HandOver => {
                self.owner = new_token;
                Duty::Nothing
            }
            Action::Scrub => {
                self.owner = 0;
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
        use Action::{Free as Freed, HandOver, Nothing as No, Own, Scrub};
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
                    refuse(Free, R::BadCommand),
                    ignore(Free),
                    (Releasing, Scrub, None),
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
                    refuse(Claimed, R::BadCommand),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
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
                    refuse(Releasing, R::BadCommand),
                    ignore(Releasing),
                    (Releasing, Scrub, None),
                    (Free, Freed, None),
                    ignore(Faulted),
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
                    refuse(Faulted, R::BadCommand),
                    (Releasing, Scrub, None),
                    (Releasing, Scrub, None),
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
        ready: true,
        coherent: true,
    };
    const CLAIM: u32 = 1;
    const RELEASE: u32 = 2;
    const TRANSFER: u32 = 3;

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
