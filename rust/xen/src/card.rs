//! A network card's packets from the guest.
