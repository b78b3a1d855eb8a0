import static org.assertj.core.api.Assertions.assertThat;
import static org.junit.jupiter.api.Assertions.assertDoesNotThrow;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.*;
import java.net.*;
import java.nio.channels.*;
import java.nio.charset.StandardCharsets;
import java.nio.file.*;
import java.util.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;

/**
 * The kernel's tables, net-tools, BusyBox and ss show the same of the same sockets, whatever their state.
 *
 * <p>Both ends of every connection are on this machine, so each has two rows in the tables; the client's, whose remote
 * port is the watched one, must never count.
 */
class SourcesTest {

    /** What shows sockets. */
    enum Source {
        kernel, netstat, busybox, ss;

        Look look(List<Endpoint> endpoints) {
            if (this != kernel) { Tools.require(name()); }
            Look look = new Look(endpoints);
            assertDoesNotThrow(() -> {
                if (this == kernel) {
                    for (Endpoint endpoint : endpoints) {
                        for (KernelTable table : endpoint.tables()) { table.read(look::add); }
                    }
                    return;
                }
                String command = this == busybox ? "busybox netstat -tanx" : name() + " -tanx";
                Process process = new ProcessBuilder(command.split(" ")).start();
                Tool tool = this == ss ? Tool.ss : Tool.netstat;
                tool.parse(process.inputReader(StandardCharsets.ISO_8859_1)).forEach(look::add);
            });
            return look;
        }

        /** It shows so many connections, as soon as the kernel has closed what was closed, and names their clients. */
        void sees(int connections, List<Endpoint> endpoints, Socket... clients) {
            Hook.waitUntil(this + " sees " + connections, () -> look(endpoints).count() == connections);
            String seen = assertDoesNotThrow(() -> look(endpoints).describe(connections));
            for (Socket client : clients) {
                assertThat(seen).contains((client.getLocalAddress() instanceof Inet6Address
                        ? "[::1]:" : "127.0.0.1:") + client.getLocalPort());
            }
        }
    }

    @TempDir
    private Path directory;

    @BeforeEach
    void needsIpv6() throws IOException {
        assumeTrue(NetworkInterface.getByInetAddress(InetAddress.getByName("::1")) != null,
                "needs IPv6 on the loopback interface");
    }

    @ParameterizedTest
    @EnumSource
    void agreeWhileConnectionsComeAndGo(Source source) {
        try (Server server = Server.start(); Server other = Server.start()) {
            List<Endpoint> port = List.of(Endpoint.port(server.port(), true));
            other.connect();
            source.sees(0, port);
            Server.Connection ipv4 = server.connect("127.0.0.1"); // mapped, as the server listens on [::]
            source.sees(1, port, ipv4.client());
            Server.Connection ipv6 = server.connect("::1");
            source.sees(2, port, ipv4.client(), ipv6.client());
            ipv4.close();
            source.sees(1, port, ipv6.client());
            for (int connections = 2; connections <= 200; connections++) { server.connect(); }
            source.sees(200, port);
            server.close();
            source.sees(0, port);
        }
    }

    @ParameterizedTest
    @EnumSource
    void agreeOnSocketsOfIpv4(Source source) throws IOException {
        // A java.net.ServerSocket is an IPv6 socket whatever it is bound to, and shows up among those.
        try (ServerSocketChannel listener = ServerSocketChannel.open(StandardProtocolFamily.INET)
                .bind(new InetSocketAddress("127.0.0.1", 0))) {
            List<Endpoint> port = List.of(Endpoint.port(listener.socket().getLocalPort(), true));
            source.sees(0, port);
            try (SocketChannel client = SocketChannel.open(listener.getLocalAddress())) {
                source.sees(1, port, client.socket()); // established, though nobody accepts it
            }
            source.sees(0, port);
        }
    }

    @ParameterizedTest
    @EnumSource
    void agreeThatOnlyAnEstablishedConnectionCounts(Source source) throws IOException {
        try (Server server = Server.start()) {
            List<Endpoint> port = List.of(Endpoint.port(server.port(), true));
            Server.Connection closeWait = server.connect();
            Server.Connection finWait2 = server.connect();
            Server.Connection timeWait = server.connect();
            source.sees(3, port, closeWait.client(), finWait2.client(), timeWait.client());
            // What the server's end is in:
            closeWait.client().shutdownOutput();
            source.sees(2, port, finWait2.client(), timeWait.client());
            finWait2.server().shutdownOutput();
            source.sees(1, port, timeWait.client());
            timeWait.server().close(); // before the other end
            timeWait.client().close();
            source.sees(0, port);
        }
    }

    /** But net-tools shows a path up to its first blank, and ss no client that was not accepted yet. */
    @ParameterizedTest
    @EnumSource
    void agreeOnUnixSocketsThatComeAndGo(Source source) throws Exception {
        Path file = Files.createDirectory(directory.resolve("my own")).resolve("b 1.sock");
        List<Endpoint> plain = List.of(Endpoint.socket(directory + "/b.sock", true));
        List<Endpoint> withBlanks = List.of(Endpoint.socket(file.toString(), true));
        try (Server.OnSocket unix = new Server.OnSocket(directory.resolve("b.sock"));
                Server.OnSocket odd = new Server.OnSocket(file); AutoCloseable build = odd.connect()) {
            source.sees(0, plain);
            SocketChannel client = unix.knock();
            source.sees(source == Source.ss ? 0 : 1, plain);
            SocketChannel accepted = unix.accept();
            source.sees(1, plain);
            unix.connect();
            source.sees(2, plain);
            client.close();
            source.sees(2, plain); // buildkitd's end is still there
            accepted.close();
            source.sees(1, plain);
            source.sees(source == Source.netstat ? 0 : 1, withBlanks);
        }
    }
}
